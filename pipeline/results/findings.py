"""Findings as people read them: those that differ in their subject only become one sentence. Manifests and JSON keep
each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipeline.errors import Refused
from stages.job import Finding


def merged(found: Sequence[Finding]) -> list[Finding]:
    """In the order of the first of each."""
    groups = dict[Hashable, list[Finding]]()
    for i, finding in enumerate(found):
        group = i if finding.subject is None else _but_for_its_subject(finding)
        groups.setdefault(group, []).append(finding)
    return [_one_sentence(group) for group in groups.values()]


def _but_for_its_subject(finding: Finding) -> Hashable:
    return finding.stage, finding.severity, finding.rule, finding.override, _predicate(finding)


def _predicate(finding: Finding) -> str:
    """The advice without the subject that it begins with."""
    return finding.advice.removeprefix(f"{finding.subject} ")


def _one_sentence(group: Sequence[Finding]) -> Finding:
    first = group[0]
    if len(group) == 1:
        return first
    subjects = ", ".join(str(finding.subject) for finding in group)
    return first.model_copy(update={"subject": None, "advice": f"each of {subjects} {_predicate(first)}"})


def refuse(found: Sequence[Finding]) -> None:
    """Raise Refused for the first finding on which nothing is to be trained. Those that have no override of their own
    are an audit's."""
    if first := next((finding for finding in found if finding.severity == "stop"), None):
        override = f"or, if it is meant so, stages.{first.stage}.audit=false"
        raise Refused(f"{first.stage}: {first.advice} ({f'--set {first.override}' if first.override else override})")
