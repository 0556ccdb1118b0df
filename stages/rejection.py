"""Rejection sampling: many rollouts a row, of which the best are kept as SFT data.

policy + rows of a problem -> rows of token ids, as they were sampled, with where each comes from (`data`); all
rollouts, to read (`rollouts`); and as many of the same rows drawn at random, to see what the choice is worth
(`control`). Which are kept is `stages.data.selection`'s. Rollouts are sampled afresh, or are those that the policy's
grpo stage was trained on, which it logged. Cheap to import: torch comes with `run`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from stages.config import FromList, StageConfig, identity, resolved
from stages.data.rollout_line import RolloutLine
from stages.data.selection import Keep, Pool, candidate, control, funnel, select
from stages.errors import BadInput
from stages.grpo import ROLLOUTS, GrpoConfig
from stages.job import Finding, Format, Job, Result, parse_rows, train_rows
from stages.problems.custom.settings import by_component
from stages.stage import Earlier, Inspected, Read, Stage

if TYPE_CHECKING:
    from stages.problems.base import Problem, Row

CONTROL, RANDOM = "control", "random"
"""The output that is drawn at random, which `data: harvest:control` reads; and how."""


class RejectionConfig(StageConfig):
    """Settings of a `rejection` stage."""

    kind: Literal["rejection"] = resolved("rejection")
    rows: str | None = resolved(None)
    """The rows to sample, such as train[0:1000]. Off: the rows its policy was trained on."""
    source: Literal["fresh", "training", "both"] = identity("fresh")
    """Where rollouts come from: `fresh`, sampled from the policy; `training`, those that its grpo stage logged while
    it was trained, which cost nothing and come from its policies on the way; `both`, pooled."""
    training_steps: Annotated[tuple[int, int], FromList] | None = identity(None)
    """Of the logged ones, only those of these optimiser steps, both included, from 1; later policies are better. Off:
    all."""
    samples: int = identity(8, ge=1)
    """Fresh rollouts per row."""
    temperature: float = identity(1.0, gt=0)
    """Of the sampling."""
    max_completion_length: int = identity(512, ge=1)
    """Tokens a fresh completion may have, the prefix not counted."""
    keep: Keep = identity(Keep())
    """Which of them become data."""
    control: Literal["random"] | None = identity(None)
    """`random`: in addition to the kept rollouts, as many rollouts of the same rows drawn at random. An sft stage reads
    them as `data: <name>:control`. Off: none."""

    @model_validator(mode="after")
    def _steps_of_a_log(self) -> RejectionConfig:
        steps = self.training_steps
        if self.source == "training":
            self._samples_nothing()
        if steps and self.source == "fresh":
            raise ValueError("training_steps belongs to source: training or both; remove it, or set source")
        if steps and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"training_steps: found {list(steps)}, expected the first and the last, such as [81, 160]")
        return self

    def _samples_nothing(self) -> None:
        """Refuse what says how to sample where nothing is."""
        for name in ("samples", "temperature", "max_completion_length"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with source: training, which samples nothing; remove it")


def reads(config: RejectionConfig) -> tuple[Read, ...]:
    """The log of its policy's training."""
    return (Read("training", "policy", config.policy, ROLLOUTS),) if config.source != "fresh" else ()


def rows(config: RejectionConfig, earlier: Earlier) -> str:
    """Its own rows, else those that its policy was trained on. Raises BadInput where the policy was trained on none."""
    if config.rows:
        return config.rows
    policy = earlier.get(config.policy)
    if isinstance(policy, GrpoConfig):
        return policy.rows
    raise BadInput(
        f"stages.{config.name}.rows is missing, and its policy {config.policy} is no grpo stage to take them from; "
        f"say which rows to sample"
    )


def check(config: RejectionConfig, earlier: Earlier, seed: int) -> None:
    """Raise BadInput for a log that its policy does not have, and for rows that are no range of train rows or not in
    the log."""
    policy = earlier.get(config.policy)
    if config.source != "fresh":
        _has_a_log(config, policy)
    rows(config, earlier)
    if config.rows is None:
        return
    own = train_rows(config.name, config.rows, seed)
    if config.source == "training" and isinstance(policy, GrpoConfig):
        theirs = parse_rows(policy.rows, seed)
        if not theirs.start <= own.start < own.stop <= theirs.stop:
            raise BadInput(
                f"stages.{config.name}.rows: found {own}, but {config.policy} is trained on {theirs}, and source: "
                f"training has no others; ask for some of these, or set source: both"
            )


def _has_a_log(config: RejectionConfig, policy: StageConfig | None) -> None:
    """Raise BadInput unless a grpo stage logged what it sampled, at those steps and in its own Format."""
    if not isinstance(policy, GrpoConfig):
        raise BadInput(
            f"stages.{config.name}.source: found {config.source!r}, but its policy {config.policy} is no grpo stage, "
            f"which would have logged what it sampled; set source: fresh"
        )
    if config.training_steps and config.training_steps[1] > policy.steps:
        raise BadInput(
            f"stages.{config.name}.training_steps: found {list(config.training_steps)}, but {config.policy} has "
            f"{policy.steps} steps; expected two of 1 to {policy.steps}"
        )
    if config.format is not None:
        raise BadInput(
            f"stages.{config.name}.format: the rollouts of {config.policy}'s training are rendered with its own "
            f"Format; remove format, or set source: fresh"
        )


def run(job: Job) -> Result:
    """Write data/, rollouts/ and, where it is asked for, control/. Raises BadInput for a log that another tokenizer or
    Format made, or that has none of the rows."""
    from stages.data import harvest, rollouts
    from stages.guard import failures
    from stages.policy import models
    from stages.problems import catalog
    from stages.runtime import ranks

    config, out = RejectionConfig.model_validate(job.config), Path(job.out)
    assert job.rows is not None and job.problem is not None, "the plan gives rejection both"
    problem = catalog.load(job.problem, job.copies)
    sampled_rows = catalog.rows(problem, job.rows)
    fresh = _fresh(job, config, sampled_rows) if config.source != "training" else {}
    if not ranks.first():
        return Result(outputs={}, metrics={})
    tokenizer = models.load_tokenizer(models.local_path(job.inputs["policy"], weights=False), job.format)
    card = rollouts.card(tokenizer, job, config.temperature, config.max_completion_length)
    logged, training = _logged(job, config, sampled_rows, card) if config.source != "fresh" else ({}, None)
    missing = _missing(job, config, sampled_rows, logged) if config.source != "fresh" else ()
    pools = [
        _pool(row, [*fresh.get(row.id, []), *logged.get(row.id, [])], config.keep, problem) for row in sampled_rows
    ]
    sampled = harvest.Sampled(card["sampling"] if config.source != "training" else None, training)
    card = {**card, "sampling": sampled._asdict()}
    rollouts.write(out / "rollouts", harvest.selected(pools), card)
    about = {**card, "keep": config.keep.model_dump(mode="json"), "source": config.source, "funnel": _funnel(pools)}
    picks = [[i for i, choice in enumerate(pool.choices) if choice.rank is not None] for pool in pools]
    harvest.write(out / "data", harvest.rows(tokenizer, job.format, pools, picks, sampled), about)
    outputs = {"data": "data", "rollouts": "rollouts"}
    if config.control:
        drawn = [_drawn(pool, len(picked), job.seed) for pool, picked in zip(pools, picks, strict=True)]
        rows_drawn = harvest.rows(tokenizer, job.format, pools, drawn, sampled, RANDOM)
        harvest.write(out / CONTROL, rows_drawn, {**about, CONTROL: config.control})
        outputs[CONTROL] = CONTROL
    found = failures.found(job.name, problem, (line["failure"] for pool in pools for line in pool.lines))
    return Result(
        outputs=outputs,
        metrics=_metrics(pools),
        findings=(*missing, *found),
        format=Format.model_validate(card["format"]),
    )


def _fresh(job: Job, config: RejectionConfig, rows: Sequence[Row]) -> dict[str, list[RolloutLine]]:
    """Row -> what its policy answers now."""
    from stages.data import rollouts
    from stages.runtime.metrics import MetricsLog
    from stages.sampling import Decoding

    log = MetricsLog(Path(job.out))
    decoding = Decoding(config.temperature, config.max_completion_length, config.samples)
    groups = rollouts.player(job).play(rows, decoding, lambda done: log.write(done, len(rows)))
    return {
        row.id: [rollouts.line(row.id, i, one) for i, one in enumerate(group)]
        for row, group in zip(rows, groups, strict=True)
    }


def _logged(
    job: Job, config: RejectionConfig, rows: Sequence[Row], card: Mapping[str, Any]
) -> tuple[dict[str, list[RolloutLine]], dict[str, Any]]:
    """(row -> what was sampled while the policy was trained, how it was sampled)"""
    from stages.data import rollouts

    directory = Path(job.inputs["training"])
    theirs = rollouts.read_card(directory)
    if any(theirs[name] != card[name] for name in ("tokenizer", "format")):
        raise BadInput(
            f"{job.name}: the rollouts of {job.sources['training']} were rendered with another Format than this "
            f"stage's; remove the stage's format, or set source: fresh"
        )
    first, last = config.training_steps or (1, math.inf)
    found: dict[str, list[RolloutLine]] = {}
    for line in rollouts.read(directory):
        if line["step"] is not None and first <= line["step"] <= last:
            found.setdefault(line["row"], []).append(line)
    if not any(row.id in found for row in rows):
        raise BadInput(
            f"{job.name}: the log of {job.sources['training']} has no rollout of these rows and steps; look at rows "
            f"and training_steps"
        )
    return found, {**theirs["sampling"], "policy": job.sources["training"]}


def _missing(
    job: Job, config: RejectionConfig, rows: Sequence[Row], logged: Mapping[str, list[RolloutLine]]
) -> tuple[Finding, ...]:
    """How many of the rows the log has, where that is not all: a training may end before it has met every row."""
    there = sum(row.id in logged for row in rows)
    if there == len(rows):
        return ()
    steps = " in steps {} to {}".format(*config.training_steps) if config.training_steps else ""
    others = "nothing can be kept" if config.source == "training" else "all is fresh"
    return (
        Finding(
            rule="rows_not_in_log",
            severity="note",
            stage=job.name,
            evidence={"in_log": float(there), "rows": float(len(rows))},
            advice=f"the log of {job.sources['training']} has rollouts of {there} of the {len(rows)} rows{steps}; of "
            f"the others {others}",
        ),
    )


def _pool(row: Row, lines: list[RolloutLine], keep: Keep, problem: Problem) -> Pool:
    named: list[RolloutLine] = [
        {**line, "rewards": by_component(line["rewards"], problem.reward_weights)} for line in lines
    ]
    group = [candidate(line, problem.reward_weights, problem.passed) for line in named]
    return Pool(row, named, group, select(group, keep))


def _drawn(pool: Pool, count: int, seed: int) -> list[int]:
    """The control of a row."""
    return control(pool.candidates, count, random.Random(f"{CONTROL}-{seed}-{pool.row.id}"))


def _funnel(pools: Sequence[Pool]) -> dict[str, int]:
    return funnel(choice for pool in pools for choice in pool.choices)


def _metrics(pools: Sequence[Pool]) -> dict[str, float]:
    every = [one for pool in pools for one in pool.candidates]
    scored = [one for pool in pools for one in pool.candidates if any(other.scored for other in pool.candidates)]
    kept = [line for pool in pools for line, choice in zip(pool.lines, pool.choices, strict=True) if choice.rank]
    return {
        "rows": len(pools),
        "rollouts": len(every),
        "kept": len(kept),
        "kept_from_training": sum(line["step"] is not None for line in kept),
        "pass_rate": sum(one.passed for one in scored) / max(1, len(scored)),
        "score": sum(one.score for one in scored) / max(1, len(scored)),
        **{f"funnel/{rule}": count for rule, count in _funnel(pools).items()},
    }


STAGE = Stage(
    config=RejectionConfig,
    run=run,
    version=3,
    makes=lambda config: ("data", CONTROL) if config.control else ("data",),
    reads=reads,
    rows=rows,
    samples=lambda config: config.source != "training",
    check=check,
    preflight=lambda job, config, tokenizer, path: Inspected(),
)
