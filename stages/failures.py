"""What a stage says of user code that failed to judge answers, and went on."""

from __future__ import annotations

from typing import Any

from stages.job import Finding


def found(stage: str, problem: Any) -> tuple[Finding, ...]:
    """A Finding with a count per failure; none for a problem that is our own, or that judged everything."""
    guard = getattr(problem, "guard", None)
    if guard is None or not (counts := guard.counts()):
        return ()
    return (
        Finding(
            rule="answers_not_judged",
            severity="warn",
            stage=stage,
            evidence={**{name: float(count) for name, count in counts.items()}, "answers": float(guard.judged)},
            advice=f"the problem's own code failed on some answers, which count as score 0 and have no reward; the first said: {guard.first}",
        ),
    )
