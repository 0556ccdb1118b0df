"""How good a policy is: greedy and sampled scores on validation and held-out rows, with an interval.

policy -> one Evaluation a split. Validation decides between settings; held-out only reports. Both splits are the same
rows, sampled with the same seed, for every policy, so two policies can be compared row by row. Cheap to import: torch
comes with `run`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import Config, identity
from stages.job import Evaluation, Finding, Job, Result, RowRange, Split
from stages.problems.base import Row, passes
from stages.stage import Stage

if TYPE_CHECKING:
    from stages.data.rollouts import Player, Rollout
    from stages.runtime.metrics import MetricsLog


MEANS = ("greedy", "mean", "interval", "solved", "format")
"""Fields of an Evaluation that are None where no row has a score."""
EVALUATE = "evaluate"
"""The kind of the step that follows every policy."""


class Validation(Config):
    """The rows that decide."""

    rows: int = identity(200, ge=2)
    """How many. 200 rows cannot rank settings that differ by less than about 5 points."""


class Evaluate(Config):
    """How policies are evaluated."""

    rows: int = identity(1000, ge=2)
    """Held-out rows. With 1000, the standard error of a score is about 1.2 points."""
    samples: int = identity(8, ge=1)
    """Sampled completions per row, besides the greedy one."""
    temperature: float = identity(1.0, gt=0)
    """Of the samples."""
    max_completion_length: int = identity(512, ge=1)
    """Tokens a completion may have, the prefix not counted."""


class EvaluateConfig(Evaluate):
    """What an evaluate step is given: the recipe's `evaluate` and `validation` together."""

    validation: Validation = identity(Validation())

    @property
    def ranges(self) -> dict[str, RowRange]:
        """The recipe's field -> the rows it asks for; validation first."""
        asked: dict[str, tuple[Split, int]] = {
            "validation.rows": ("validation", self.validation.rows),
            "evaluate.rows": ("held_out", self.rows),
        }
        return {field: RowRange(split=split, start=0, stop=count, seed=0) for field, (split, count) in asked.items()}


def run(job: Job) -> Result:
    """Write `<split>.json` (an Evaluation) and `<split>.jsonl` (a line a row) for both splits."""
    from stages.data import rollouts
    from stages.guard import failures
    from stages.runtime import ranks
    from stages.runtime.metrics import MetricsLog

    config, out, log = EvaluateConfig.model_validate(job.config), Path(job.out), MetricsLog(Path(job.out))
    player = rollouts.player(job)
    ranges, metrics, failed = [*config.ranges.values()], dict[str, float](), list[str | None]()
    without = list[Finding]()
    done, total = 0, 2 * sum(range.stop for range in ranges)
    for range in ranges:
        split, rows = range.split, player.rows(range)
        greedy, sampled = _play(player, config, rows, log, done, total)
        done += 2 * len(rows)
        if not ranks.first():
            continue
        evaluation = summarise(job, config, split, player, greedy, sampled)
        (out / f"{split}.json").write_text(evaluation.model_dump_json(indent=1), encoding="utf-8")
        _write_rows(out / evaluation.per_row, rows, greedy, sampled)
        failed += [one.judgement.failure for group in (greedy, *sampled) for one in group]
        without += unscored(job.name, split, greedy, sampled)
        means = {f"{split}/mean": evaluation.mean, f"{split}/greedy": evaluation.greedy}
        metrics |= {name: mean for name, mean in means.items() if mean is not None}
    outputs = {range.split: f"{range.split}.json" for range in ranges}
    found = (*failures.found(job.name, player.problem, failed), *without)
    return Result(outputs=outputs, metrics=metrics, findings=found, format=player.seen_format())


def _play(
    player: Player, config: EvaluateConfig, rows: list[Row], log: MetricsLog, done: int, total: int
) -> tuple[list[Rollout], list[list[Rollout]]]:
    """(the greedy rollout of each row, the sampled ones)."""
    from stages.sampling import Decoding

    def progress(offset: int) -> Callable[[int], None]:
        return lambda n: log.write(done + offset + n, total)

    greedy = player.play(rows, Decoding(0.0, config.max_completion_length), progress(0))
    sampling = Decoding(config.temperature, config.max_completion_length, config.samples)
    sampled = player.play(rows, sampling, progress(len(rows)))
    return [only for (only,) in greedy], sampled


def summarise(
    job: Job,
    config: Evaluate,
    split: Split,
    player: Player,
    greedy: Sequence[Rollout],
    sampled: Sequence[Sequence[Rollout]],
) -> Evaluation:
    """The numbers of one split. Rows without a score are left out of every mean."""
    import numpy as np

    from stages.data.rollouts import has_score
    from stages.estimates import bootstrap_interval, pass_at_k
    from stages.tokens import prefix

    every = [rollout.judgement for group in sampled for rollout in group]
    count = Counter(judgement.outcome for judgement in every)
    rows = [(best, group) for best, group in zip(greedy, sampled, strict=True) if has_score((best, *group))]
    judgements = [rollout.judgement for _, group in rows for rollout in group]
    numbers: dict[str, Any] = {**dict.fromkeys(MEANS), "pass_at_k": {}}
    if rows:
        scores = np.array([[rollout.judgement.score for rollout in group] for _, group in rows])
        passed = np.array([[passes(player.problem, one.judgement) for one in group] for _, group in rows], dtype=float)
        numbers = {
            "greedy": float(np.mean([best.judgement.score for best, _ in rows])),
            "mean": float(scores.mean()),
            "interval": bootstrap_interval(scores.mean(axis=1)),
            "solved": float(np.mean([judgement.solved for judgement in judgements])),
            "format": float(np.mean([judgement.well_formed for judgement in judgements])),
            "pass_at_k": {str(k): pass_at_k(passed, k) for k in sorted({1, config.samples})},
        }
    return Evaluation(
        policy=job.sources.get("policy", Path(job.inputs["policy"]).name),
        split=split,
        decoding={"temperature": config.temperature, "max_completion_length": config.max_completion_length},
        rows=len(sampled),
        samples=config.samples,
        seeds=[job.seed],
        unscored=len(sampled) - len(rows),
        **numbers,
        format_digest=prefix.format_digest(player.seen_format()),
        outcomes={name: count[name] / len(every) for name in player.problem.outcomes},
        per_row=f"{split}.jsonl",
    )


def unscored(
    stage: str, split: Split, greedy: Sequence[Rollout], sampled: Sequence[Sequence[Rollout]]
) -> Iterator[Finding]:
    """Rows that are left out of every mean, and answers that count as 0 because others of their row have a score."""
    from stages.data.rollouts import has_score

    groups = [(best, *group) for best, group in zip(greedy, sampled, strict=True)]
    left_out = sum(not has_score(group) for group in groups)
    if left_out:
        yield Finding(
            rule="rows_without_score",
            severity="warn",
            stage=stage,
            evidence={"rows": float(len(groups)), "left_out": float(left_out)},
            advice=f"{left_out} of {len(groups)} {split} rows have no score (no component applies to them, or their "
            f"score is None), so every mean is over the others; look at their reference answers",
        )
    zero = sum(not one.judgement.scored for group in groups if has_score(group) for one in group)
    if zero:
        yield Finding(
            rule="answers_without_score",
            severity="warn",
            stage=stage,
            evidence={"answers": float(zero)},
            advice=f"{zero} answers to {split} rows have no score although others to the same row have one, so they "
            f"count as 0; let the score depend on the row alone where it is None",
        )


def _write_rows(
    path: Path, rows: Sequence[Row], greedy: Sequence[Rollout], sampled: Sequence[Sequence[Rollout]]
) -> None:
    """A line a row: its id and prompt, then text, score (null where there is none) and outcome of the greedy rollout
    and of every sample."""

    def said(rollout: Rollout) -> dict[str, object]:
        judgement = rollout.judgement
        score = judgement.score if judgement.scored else None
        return {"text": rollout.text, "score": score, "outcome": judgement.outcome}

    with path.open("w", encoding="utf-8") as file:
        for row, best, group in zip(rows, greedy, sampled, strict=True):
            line = {"row": row.id, "prompt": row.prompt, "greedy": said(best), "samples": [said(one) for one in group]}
            file.write(json.dumps(line) + "\n")


STAGE = Stage(
    config=EvaluateConfig,
    run=run,
    version=3,
    samples=lambda config: True,
    ranges=lambda config: config.ranges,
)
