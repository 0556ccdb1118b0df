"""What is not done because of what was measured: an alias stays where it is, a run stops before it trains. Nothing is broken; exit code 3."""

from __future__ import annotations

from collections.abc import Sequence

from stages.job import Finding


class Refused(RuntimeError):
    """One line: the numbers, and what to do."""


def refuse(found: Sequence[Finding]) -> None:
    """Raise Refused for the first finding on which nothing is to be trained."""
    if first := next((finding for finding in found if finding.severity == "stop"), None):
        raise Refused(f"{first.stage}: {first.advice} (or, if it is meant so, stages.{first.stage}.audit=false)")
