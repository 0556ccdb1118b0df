"""What a stage says of user code that failed to judge answers, and went on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from stages.job import Finding


def found(stage: str, problem: Any, failures: Iterable[str | None]) -> tuple[Finding, ...]:
    """A Finding with a count per kind of failure, of which there is one, or None, for each answer; none where
    everything was judged."""
    every = list(failures)
    counts = Counter(failure for failure in every if failure)
    if not counts:
        return ()
    first = first_message(problem)
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return (
        Finding(
            rule="answers_not_judged",
            severity="warn",
            stage=stage,
            evidence={**{name: float(count) for name, count in counts.items()}, "answers": float(len(every))},
            advice=(
                f"the problem's own code failed on {counts.total()} of {len(every)} answers ({said}), which count as "
                "score 0 and have no reward"
            )
            + (f"; the first said: {first}" if first else ""),
        ),
    )


def first_message(problem: Any) -> str | None:
    """What the first failure in this process said; None for a problem that is our own, or that judged everything."""
    guard = getattr(problem, "guard", None)
    return guard.first or None if guard else None
