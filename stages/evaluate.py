"""How good a policy is: greedy and sampled scores on validation and held-out rows, with an interval.

policy -> one Evaluation a split. Validation decides between settings; held-out only reports. Both splits are the same
rows, sampled with the same seed, for every policy, so two policies can be compared row by row. Cheap to import: torch
comes with `run`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import Config, identity
from stages.job import Evaluation, Job, Result, RowRange, Split
from stages.problems.base import Row, passes
from stages.stage import Stage

if TYPE_CHECKING:
    from stages.data.rollouts import Player, Rollout
    from stages.runtime.metrics import MetricsLog


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
    done, total = 0, 2 * sum(range.stop for range in ranges)
    for range in ranges:
        split, rows = range.split, player.rows(range)
        greedy, sampled = _play(player, config, rows, log, done, total)
        done += 2 * len(rows)
        if not ranks.first():
            continue
        evaluation = summarise(job, config, split, player, greedy, sampled)
        (out / f"{split}.json").write_text(evaluation.model_dump_json(indent=1))
        _write_rows(out / evaluation.per_row, rows, greedy, sampled)
        failed += [one.judgement.failure for group in (greedy, *sampled) for one in group]
        metrics |= {f"{split}/mean": evaluation.mean, f"{split}/greedy": evaluation.greedy}
    outputs = {range.split: f"{range.split}.json" for range in ranges}
    found = failures.found(job.name, player.problem, failed)
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
    """The numbers of one split."""
    import numpy as np

    from stages.estimates import bootstrap_interval, pass_at_k
    from stages.tokens import prefix

    scores = np.array([[rollout.judgement.score for rollout in group] for group in sampled])
    judgements = [rollout.judgement for group in sampled for rollout in group]
    passed = np.array([[passes(player.problem, one.judgement) for one in group] for group in sampled], dtype=float)
    count = Counter(judgement.outcome for judgement in judgements)
    return Evaluation(
        policy=job.sources.get("policy", Path(job.inputs["policy"]).name),
        split=split,
        decoding={"temperature": config.temperature, "max_completion_length": config.max_completion_length},
        rows=len(sampled),
        samples=config.samples,
        seeds=[job.seed],
        greedy=float(np.mean([rollout.judgement.score for rollout in greedy])),
        mean=float(scores.mean()),
        interval=bootstrap_interval(scores.mean(axis=1)),
        solved=float(np.mean([judgement.solved for judgement in judgements])),
        format=float(np.mean([judgement.well_formed for judgement in judgements])),
        format_digest=prefix.format_digest(player.seen_format()),
        pass_at_k={str(k): pass_at_k(passed, k) for k in sorted({1, config.samples})},
        outcomes={name: count[name] / len(judgements) for name in player.problem.outcomes},
        per_row=f"{split}.jsonl",
    )


def _write_rows(
    path: Path, rows: Sequence[Row], greedy: Sequence[Rollout], sampled: Sequence[Sequence[Rollout]]
) -> None:
    """A line a row: its id and prompt, then text, score and outcome of the greedy rollout and of every sample."""

    def said(rollout: Rollout) -> dict[str, object]:
        return {"text": rollout.text, "score": rollout.judgement.score, "outcome": rollout.judgement.outcome}

    with path.open("w") as file:
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
