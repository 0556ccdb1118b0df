"""Whether rewards tell rollouts apart: GRPO learns from a group only where two of its rollouts have different rewards.

the rewards of a step's rollouts -> a count of silent steps, of which the first ones may stop the stage (NoSignal) and
the others become findings. The count is part of a checkpoint, so a resumed stage stops where it would have stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from stages.errors import NoSignal
from stages.job import Finding

DROUGHT = 50
"""Silent steps in a row, after the first step with a signal, that are a finding."""


@dataclass
class Signal:
    """The steps so far."""

    steps: int = 0
    """Steps whose rollouts were judged."""
    silent: int = 0
    """Silent ones in a row, up to now."""
    longest: int = 0
    """The most silent ones in a row after the first step with a signal."""
    ever: bool = False
    """Some step had a signal."""
    at_best: bool = True
    """All rollouts of the silent steps before the first signal were solved."""

    def held(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def hear(self, speaks: bool, solved: bool, steps: int) -> None:
        """The rollouts of so many further steps: two of some group have different rewards; all are solved."""
        self.steps += steps
        self.silent = 0 if speaks else self.silent + steps
        if self.ever:
            self.longest = max(self.longest, self.silent)
        elif not speaks:
            self.at_best = self.at_best and solved
        self.ever = self.ever or speaks

    def refuse(self, limit: int | None) -> None:
        """Raise NoSignal where the first `limit` steps were silent, and not because every rollout is solved. None:
        never."""
        if limit is None or self.ever or self.at_best or self.steps < limit:
            return
        raise NoSignal(
            f"in the first {self.steps} steps no group had two different rewards, so nothing was learnt and nothing is "
            f"published; look at rewards with switchback audit, warm the policy up, or set stop_without_signal=null"
        )

    def findings(self, stage: str) -> Iterator[Finding]:
        """A stage that ended without a signal, or went without one for long."""
        silent = self.longest if self.ever else self.steps
        if not silent or (self.ever and silent < DROUGHT):
            return
        solved = not self.ever and self.at_best
        when = f"for {silent} steps in a row no group" if self.ever else f"no group of its {silent} steps"
        why = "every rollout was solved; give it harder rows" if solved else "look at rewards, group_size and rows"
        yield Finding(
            rule="no_signal",
            severity="warn",
            stage=stage,
            evidence={"steps": float(self.steps), "silent": float(silent)},
            advice=f"{when} had two different rewards, so nothing was learnt from them: {why}",
        )


def speaks(rewards: Tensor, group_size: int) -> bool:
    """(rollouts,) of whole groups one after another, NaN for one without a reward -> whether two rewards of a group
    differ."""
    groups = rewards.view(-1, group_size)
    there = ~groups.isnan()
    least = groups.masked_fill(~there, float("inf")).amin(1)
    most = groups.masked_fill(~there, float("-inf")).amax(1)
    return bool((most > least).any())
