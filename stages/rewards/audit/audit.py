"""The audit of a reward: what it pays for answers whose worth is known, before anything is trained by it.

rows + the problem's baselines (`stages.rewards.audit.baselines`) -> rewards and score of each, side by side ->
`audit.json` and findings (`stages.rewards.audit.rules`). Needs no model, no tokenizer and no torch. The same rows,
seed and problem give the same report.

A reward has no scale of its own, so the audit states it as a *share*: 0 is the least reward that any of the answers
earned and 1 the greatest. Where the problem has no gold, the greatest that was seen may be far from the best; there
the range is what would be possible with components that reach 0 and 1 at least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from stages.config import Config, Frozen, identity
from stages.errors import TooManyFailures
from stages.guard.failures import first_message
from stages.job import Finding, Job, Result, RowRange
from stages.problems import catalog, files
from stages.problems.base import Problem
from stages.problems.custom.settings import by_component
from stages.rewards.audit import baselines
from stages.rewards.audit.baselines import GOLD, Baseline
from stages.rewards.audit.facts import Audited, Line
from stages.rewards.audit.rules import exploits, findings
from stages.rewards.audit.table import Heard, Range, Table, play
from stages.rewards.compose import Rewards, weights_of
from stages.runtime.metrics import MetricsLog

FILE = "audit.json"
FIRST = 3
"""Answers that are tried before all are played."""
KEPT = 0.02
"""Score and reward share that gold may lose by a change that fixes something; with touching events as overlaps, an
optimal schedule earns .993."""
Others = Iterable[tuple[str, Problem]]
"""(a `--set`, the problem with it)"""


class AuditConfig(Config):
    """Settings of an audit. The job has its problem, rows and Format."""

    rows: int = identity(100, ge=1)
    """The first so many of the job's rows. Rows from a file (the input `rows`) are all played."""
    weights: dict[str, float] = identity({})
    """Component -> the weight that the stage trains with, where it is not the problem's own."""


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
    """Write `audit.json` to `job.out`. Raises BadInput for a file of rows that cannot be read, and for weights of
    components that there are not; TooManyFailures for user code that hangs on the first answers already."""
    config = AuditConfig.model_validate(job.config)
    assert job.problem is not None and job.rows is not None and job.format is not None, "the plan gives grpo all three"
    problem = catalog.load(_uncounted(job.problem), job.copies)
    file = job.inputs.get("rows")
    if file:
        rows = files.rows(problem, Path(file))
    else:
        rows = catalog.rows(problem, _first(job.rows, config.rows))
    asked, astray = baselines.of_rows(problem, rows, job.format, job.seed)
    weights_of(job.name, Rewards(weights=config.weights), problem.reward_weights)
    own = by_component(config.weights, problem.reward_weights)
    refuse_hanging(problem, asked)
    heard = partial(MetricsLog(Path(job.out)).write, total=len(asked))
    report = audit(job.name, problem, asked, astray, with_one_change(job.problem), own, heard)
    Path(job.out, FILE).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return Result(outputs={"audit": FILE}, metrics={"answers": len(asked)}, findings=report.findings)


def _uncounted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The problem, whose own code may fail on any number of answers: it is what the audit is to tell of."""
    return {**settings} if "name" in settings else {**settings, "max_failures": 1.0}


def refuse_hanging(problem: Problem, asked: Sequence[Baseline]) -> None:
    """Raise TooManyFailures where user code has no time for any of the first answers, gold where there is some: it
    would wait as long for every other."""
    golds = [one.answer for one in asked if one.name == GOLD]
    first = (golds or [one.answer for one in asked])[:FIRST]
    if all(one.failure == "timeout" for one in problem.judge(first)):
        raise TooManyFailures(
            f"the problem's own code judged none of the first {len(first)}{' gold' if golds else ''} answers: "
            f"{first_message(problem)}; fix it, or raise problem.time_limit"
        )


def audit(
    stage: str,
    problem: Problem,
    asked: Sequence[Baseline],
    astray: int,
    others: Others = (),
    own: Mapping[str, float] = MappingProxyType({}),
    heard: Heard = lambda done: None,
) -> Report:
    """What the problem says to every baseline. `astray` is how many golds do not start with the response prefix;
    `others` are what the problem would be with one setting changed; `own` are weights in the place of the problem's;
    `heard` gets the number of judged answers."""
    weights = {**problem.reward_weights, **own}
    table = play(problem, weights, asked, heard)
    fixes = _fixes(table, asked, ((change, other, {**other.reward_weights, **own}) for change, other in others))
    causes = _causes(problem, table, asked)
    found = findings(Audited(stage, weights, table.played, table.lines, astray, fixes, first_message(problem), causes))
    rows = len({one.row for one in asked})
    return Report(
        stage=stage, rows=rows, weights=weights, range=table.range, baselines=table.lines, findings=tuple(found)
    )


def _causes(problem: Problem, table: Table, asked: Sequence[Baseline]) -> dict[str, str]:
    """Component that no answer has -> why, where the problem can tell."""
    why = getattr(problem, "why_none", None)
    if why is None or not asked:
        return {}
    there = {name for one in table.played for name, value in one.judgement.rewards.items() if value is not None}
    found = {name: why(name, asked[0].answer.row) for name in problem.reward_weights if name not in there}
    return {name: cause for name, cause in found.items() if cause}


def with_one_change(settings: Mapping[str, Any]) -> Iterator[tuple[str, Problem]]:
    """(a `--set`, the problem with it) for every other choice that a built-in problem's settings have. Nothing for
    other problems."""
    if (name := settings.get("name")) is None:
        return
    for field, info in catalog.PROBLEMS[name].settings.model_fields.items():
        for choice in get_args(info.annotation) if get_origin(info.annotation) is Literal else ():
            if choice != settings.get(field, info.default):
                yield f"problem.{field}={choice}", catalog.load({**settings, field: choice})


def _fixes(
    table: Table, asked: Sequence[Baseline], others: Iterable[tuple[str, Problem, Mapping[str, float]]]
) -> dict[str, str]:
    """Exploitable baseline -> the first change with which it is not, and gold is worth and paid as before."""
    left = {line.name for line in table.lines if exploits(line)}
    gold = next((line for line in table.lines if line.name == GOLD), None)
    fixes = dict[str, str]()
    for change, problem, weights in others if left else ():
        lines = {line.name: line for line in play(problem, weights, asked).lines}
        if _worth_the_same(lines.get(GOLD), gold):
            fixes |= {name: change for name in left - fixes.keys() if not exploits(lines[name])}
    return fixes


def _worth_the_same(changed: Line | None, gold: Line | None) -> bool:
    """Whether gold is still the best, as far as it was."""
    if changed is None or gold is None or changed.share is None or gold.share is None:
        return False
    return abs(changed.score - gold.score) <= KEPT and abs(changed.share - gold.share) <= KEPT


def _first(rows: RowRange, most: int) -> RowRange:
    return rows.model_copy(update={"stop": min(rows.stop, rows.start + most)})
