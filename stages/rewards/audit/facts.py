"""What an audit found out, for its rules to look at: every answer that was played, and a line a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from stages.config import Frozen
from stages.job import Finding
from stages.problems.base import Judgement
from stages.rewards.audit.baselines import GOLD

EXACT = 1e-9
"""Differences of rewards and scores that are rounding."""


class Played(NamedTuple):
    """One answer and what it got."""

    name: str
    own: bool
    """A baseline of the problem's own."""
    row: int
    judgement: Judgement
    passed: bool
    reward: float | None
    """The weighted sum of its components; None where no component could be had."""


class Line(Frozen):
    """A baseline over all its rows."""

    name: str
    own: bool
    """The problem's own; False: one that fits any problem."""
    rows: int
    reward: float | None
    """Mean, weighted. None: there was none."""
    share: float | None
    """Where its mean reward lies between the least and the greatest, 0..1."""
    score: float
    """Mean, 0..1."""
    outcomes: dict[str, int]
    rewards: dict[str, float | None]
    """Component -> mean."""
    failures: dict[str, int]
    """What user code did instead of judging -> how often."""

    @property
    def gap(self) -> float:
        """How far the reward's share is above the score's."""
        return (self.share or 0.0) - self.score


class Audited(NamedTuple):
    """Everything that rules look at."""

    stage: str
    weights: Mapping[str, float]
    played: Sequence[Played]
    lines: Sequence[Line]
    astray: int
    """Rows whose gold does not start with the response prefix."""
    fixes: Mapping[str, str]
    """Exploitable baseline -> a `--set` with which it is not."""
    first_failure: str | None = None
    """What user code said when it failed first."""
    causes: Mapping[str, str] = MappingProxyType({})
    """Component -> why it is probably None, where that is known."""

    @property
    def has_gold(self) -> bool:
        """Whether it is known what the best answer is."""
        return any(line.name == GOLD for line in self.lines)

    def values(self, component: str) -> list[tuple[float, Played]]:
        """What a component gave, where it applied."""
        pairs = ((one.judgement.rewards.get(component), one) for one in self.played)
        return [(value, one) for value, one in pairs if value is not None]

    def of(self, component: str) -> list[float]:
        """The same without the answers."""
        return [value for value, _ in self.values(component)]


def warn(audited: Audited, rule: str, evidence: dict[str, float], advice: str) -> Finding:
    """A finding of a rule about the stage as a whole."""
    return Finding(rule=rule, severity="warn", stage=audited.stage, evidence=evidence, advice=advice)


def warn_of(
    subject: str, audited: Audited, rule: str, evidence: dict[str, float], predicate: str, override: str | None = None
) -> Finding:
    """A finding of a rule about a baseline or a component: `subject` and `predicate` make the advice. `override` is
    the `--set` that follows it."""
    found = warn(audited, rule, evidence, f"{subject} {predicate}")
    return found.model_copy(update={"subject": subject, "override": override})
