"""The finding about user code that failed to judge some answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from stages.job import Finding


def found(stage: str, problem: Any, failures: Iterable[str | None]) -> tuple[Finding, ...]:
    """A Finding with a count per kind of failure; none where every answer was judged. `failures` holds the failure of
    each answer, or None."""
    every = list(failures)
    counts = Counter(failure for failure in every if failure)
    if not counts:
        return ()
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    advice = (
        f"the problem's own code failed on {counts.total()} of {len(every)} answers ({kinds}), which count as score 0 "
        "and have no reward"
    )
    first = first_message(problem)
    if first:
        advice += f"; the first said: {first}"
    evidence = {**{name: float(count) for name, count in counts.items()}, "answers": float(len(every))}
    return (Finding(rule="answers_not_judged", severity="warn", stage=stage, evidence=evidence, advice=advice),)


def first_message(problem: Any) -> str | None:
    """The message of the first failure in this process; None for a built-in problem, and where nothing failed."""
    guard = getattr(problem, "guard", None)
    if guard is None:
        return None
    return guard.first or None
