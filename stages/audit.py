"""The audit of a reward: what it pays for answers whose worth is known, before anything is trained by it.

rows + the problem's baselines (`stages.baselines`) -> rewards and score of each, side by side -> `audit.json` and findings (`stages.audit_rules`).
Needs no model, no tokenizer and no torch. The same rows, seed and problem give the same report.

A reward has no scale of its own, so it is told as a *share*: 0 is the least reward that any of the answers earned and 1 the greatest. Where the problem has
no gold, the greatest that was seen may be far from the best; there the range is what would be possible with components that reach 0 and 1 at least.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from stages import baselines, problems
from stages.audit_rules import Audited, Line, Played, findings
from stages.baselines import GOLD
from stages.config import Config, Frozen, identity
from stages.job import BadInput, Finding, Job, Result, RowRange
from stages.problems.base import Judgement, Problem, Row

FILE = "audit.json"


class AuditConfig(Config):
    """What to look at, beside the job's own problem, rows and Format."""

    rows: int = identity(100, ge=1)
    """The first so many of the job's rows. Rows from a file (the input `rows`) are all played."""


class Range(Frozen):
    """What a share of the reward is a share of."""

    least: float
    greatest: float
    source: Literal["seen", "possible"]
    """`seen`: what the answers earned. `possible`: what components from 0 to 1 could, where no gold was played."""

    def share(self, reward: float) -> float:
        """0..1; 0 where every reward is the same."""
        return (reward - self.least) / (self.greatest - self.least) if self.greatest > self.least else 0.0


class Report(Frozen):
    """The answer, as `switchback audit --json` prints it."""

    stage: str
    rows: int
    weights: dict[str, float]
    """Component -> its weight."""
    range: Range
    baselines: tuple[Line, ...]
    """In the order of what they earn, gold first."""
    findings: tuple[Finding, ...]


def run(job: Job) -> Result:
    """Write `audit.json` to `job.out`. Raises BadInput for a file of rows that cannot be read."""
    config = AuditConfig.model_validate(job.config)
    assert job.problem is not None and job.rows is not None and job.format is not None, "the plan gives grpo all three"
    problem = problems.load(job.problem)
    file = job.inputs.get("rows")
    rows = read_rows(problem, Path(file)) if file else problems.rows(problem, _first(job.rows, config.rows))
    asked, astray = baselines.of_rows(problem, rows, job.format, job.seed)
    report = audit(job.name, problem, asked, astray)
    Path(job.out, FILE).write_text(report.model_dump_json(indent=1))
    return Result(outputs={"audit": FILE}, metrics={"answers": len(asked)}, findings=report.findings)


def audit(stage: str, problem: Problem, asked: Sequence[baselines.Baseline], astray: int) -> Report:
    """What the problem says to every baseline. `astray` is how many golds do not start with the response prefix."""
    weights = dict(problem.reward_weights)
    judged = problem.judge([one.answer for one in asked])
    played = [
        Played(one.name, one.own, one.row, judgement, problem.passed(judgement.score), _reward(judgement, weights))
        for one, judgement in zip(asked, judged, strict=True)
    ]
    whole = _range(played, weights)
    lines = tuple(sorted(_lines(played, weights, whole), key=lambda line: (line.name != GOLD, -(line.reward or 0.0))))
    found = findings(Audited(stage, weights, played, lines, astray))
    rows = len({one.row for one in played})
    return Report(stage=stage, rows=rows, weights=weights, range=whole, baselines=lines, findings=tuple(found))


def read_rows(problem: Problem, path: Path) -> list[Row]:
    """The rows of a JSON Lines file. Raises BadInput, with the line, for what is none."""
    rows = list[Row]()
    for i, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(problem.row(json.loads(line)))
        except (BadInput, json.JSONDecodeError) as error:
            raise BadInput(f"{path} line {i}: {error}") from None
    if not rows:
        raise BadInput(f"{path} is empty; expected a row a line, as JSON")
    return rows


def _first(rows: RowRange, most: int) -> RowRange:
    return rows.model_copy(update={"stop": min(rows.stop, rows.start + most)})


def _reward(judgement: Judgement, weights: dict[str, float]) -> float | None:
    """The weighted sum of the components that apply, as training sums them."""
    values = [(weight, judgement.rewards.get(name)) for name, weight in weights.items()]
    applied = [weight * value for weight, value in values if value is not None]
    return sum(applied) if applied else None


def _range(played: Sequence[Played], weights: dict[str, float]) -> Range:
    earned = [one.reward for one in played if one.reward is not None] or [0.0]
    if any(one.name == GOLD for one in played):
        return Range(least=min(earned), greatest=max(earned), source="seen")
    values = {name: [one.judgement.rewards.get(name) or 0.0 for one in played] for name in weights}
    ends = [sorted((weights[name] * min(0.0, *seen), weights[name] * max(1.0, *seen))) for name, seen in values.items()]
    return Range(least=sum(low for low, _ in ends), greatest=sum(high for _, high in ends), source="possible")


def _lines(played: Sequence[Played], weights: dict[str, float], whole: Range) -> Iterator[Line]:
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
            score=fmean(one.judgement.score for one in group),
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
