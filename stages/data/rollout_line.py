"""A rollout as a JSON line of `rollouts.jsonl`: grpo and rejection stages write it, rejection and `switchback diff`
read it."""

from __future__ import annotations

from typing import TypedDict


class RolloutLine(TypedDict):
    """One sampled completion, and how the problem judged it."""

    row: str
    """The row's id."""
    sample: int
    """Its number among those that were sampled for the row at once."""
    step: int | None
    """The optimiser step that sampled it. None: the policy was not being trained."""
    ids: list[int]
    """Token ids: response prefix, what was sampled, turn end where it came."""
    prefix: int
    """How many of the ids are the response prefix."""
    text: str
    """What the problem judged."""
    finished: bool
    """It came to its turn end before it was cut."""
    score: float | None
    """0..1. None: it has no score."""
    outcome: str
    rewards: dict[str, float | None]
    """Component -> value. None: the component does not apply."""
    failure: str | None
    """What user code did in place of judging. None: it judged."""


class SelectedLine(RolloutLine):
    """The same, after the rules of a rejection stage."""

    reward: float | None
    """The weighted sum of its components. None: none applies."""
    kept: bool
    dropped_by: str | None
    """The first rule that it did not meet. None: it was kept."""
