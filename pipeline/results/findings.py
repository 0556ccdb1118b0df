"""Findings as people read them: those that differ in nothing but the name they begin with are one sentence. What is remembered and what is JSON keep each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipeline.errors import Refused
from stages.job import Finding

NAMED = ("exploitable", "unearned", "constant", "absent", "sparse", "dominated", "disagree")
"""Rules of an audit whose advice begins with the name of a baseline or of a component."""


def merged(found: Sequence[Finding]) -> list[Finding]:
    """In the order of the first of each."""
    groups = dict[Hashable, list[Finding]]()
    for i, finding in enumerate(found):
        groups.setdefault(_apart_from_name(finding) if finding.rule in NAMED else i, []).append(finding)
    return [_one(group) for group in groups.values()]


def _apart_from_name(finding: Finding) -> Hashable:
    return finding.stage, finding.severity, finding.rule, finding.override, finding.advice.partition(" ")[2]


def _one(group: Sequence[Finding]) -> Finding:
    first = group[0]
    if len(group) == 1:
        return first
    names, rest = [finding.advice.partition(" ")[0] for finding in group], first.advice.partition(" ")[2]
    return first.model_copy(update={"advice": f"each of {', '.join(names)} {rest}"})


def refuse(found: Sequence[Finding]) -> None:
    """Raise Refused for the first finding on which nothing is to be trained."""
    if first := next((finding for finding in found if finding.severity == "stop"), None):
        raise Refused(f"{first.stage}: {first.advice} (or, if it is meant so, stages.{first.stage}.audit=false)")
