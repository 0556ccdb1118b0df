"""Baselines become lines: what a problem says to every answer, put together by name and told as shares of a range.

answers -> judgements -> the least and the greatest reward -> a line a baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from stages.config import Frozen
from stages.problems.base import Judgement, Problem, passes, total
from stages.rewards.audit.baselines import GOLD, Baseline
from stages.rewards.audit.facts import Line, Played

Heard = Callable[[int], None]
PART = 32
"""Answers that are judged between two words of progress; whole batches of every problem."""


class Range(Frozen):
    """What a share of the reward is a share of."""

    least: float
    greatest: float
    source: Literal["seen", "possible"]
    """`seen`: what the answers earned. `possible`: what components from 0 to 1 could, where no gold was played."""

    def share(self, reward: float) -> float:
        """0..1; 0 where every reward is the same."""
        return (reward - self.least) / (self.greatest - self.least) if self.greatest > self.least else 0.0


class Table(NamedTuple):
    """Everything that was played, and what it comes to."""

    played: list[Played]
    range: Range
    lines: tuple[Line, ...]
    """In the order of what they earn, gold first."""


def play(
    problem: Problem, weights: Mapping[str, float], asked: Sequence[Baseline], heard: Heard = lambda done: None
) -> Table:
    """What the problem says to every baseline, its components weighed by `weights`; `heard` gets the number of
    judged answers."""
    judged = list[Judgement]()
    while len(judged) < len(asked):
        heard(len(judged))
        judged += problem.judge([one.answer for one in asked[len(judged) : len(judged) + PART]])
    heard(len(judged))
    played = [
        Played(one.name, one.own, one.row, judgement, passes(problem, judgement), total(judgement.rewards, weights))
        for one, judgement in zip(asked, judged, strict=True)
    ]
    whole = _range(played, weights)
    lines = sorted(_lines(played, weights, whole), key=lambda line: (line.name != GOLD, -(line.reward or 0.0)))
    return Table(played, whole, tuple(lines))


def _range(played: Sequence[Played], weights: Mapping[str, float]) -> Range:
    earned = [one.reward for one in played if one.reward is not None] or [0.0]
    if any(one.name == GOLD for one in played):
        return Range(least=min(earned), greatest=max(earned), source="seen")
    values = {name: [one.judgement.rewards.get(name) or 0.0 for one in played] for name in weights}
    ends = [sorted((weights[name] * min(0.0, *seen), weights[name] * max(1.0, *seen))) for name, seen in values.items()]
    return Range(least=sum(low for low, _ in ends), greatest=sum(high for _, high in ends), source="possible")


def _lines(played: Sequence[Played], weights: Mapping[str, float], whole: Range) -> Iterator[Line]:
    """A line a baseline."""
    for name in dict.fromkeys(one.name for one in played):
        group = [one for one in played if one.name == name]
        reward = _mean([one.reward for one in group])
        yield Line(
            name=name,
            own=group[0].own,
            rows=len(group),
            reward=reward,
            share=None if reward is None else whole.share(reward),
            score=_mean([one.judgement.score for one in group if one.judgement.scored]) or 0.0,
            outcomes=dict(Counter(one.judgement.outcome for one in group)),
            rewards={
                component: _mean([one.judgement.rewards.get(component) for one in group]) for component in weights
            },
            failures=dict(Counter(one.judgement.failure for one in group if one.judgement.failure)),
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
