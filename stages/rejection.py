"""Rejection sampling: many rollouts a row, of which the best are kept as SFT data.

policy + rows of a problem -> rows of token ids, as they were sampled, with where each comes from; and all rollouts, to read. Selection is pure
(`select`): score, duplicates, cap per row, pass-rate band. Cheap to import: torch comes with `run`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from stages.config import Config, FromList, StageConfig, identity, resolved
from stages.job import Job, Result
from stages.problems.base import Problem

if TYPE_CHECKING:
    from stages.problems.base import Row
    from stages.rollouts import Rollout
    from stages.tokens import TokenRow


class Keep(Config):
    """Which rollouts are kept."""

    min_score: float = identity(0.99, ge=0, le=1)
    """The least score, 0..1."""
    per_prompt: int = identity(2, ge=1)
    """How many of one row at most, the best first; equal ones in the order they were sampled."""
    pass_rate: Annotated[tuple[float, float], FromList] | None = identity(None)
    """Only rows of which this share of rollouts passed, both ends included: not hopeless, not yet easy. Off: any row."""

    @model_validator(mode="after")
    def _band_is_a_band(self) -> Keep:
        if self.pass_rate and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate: found {list(self.pass_rate)}, expected two shares such as [0.05, 0.9]")
        return self


class RejectionConfig(StageConfig):
    """Settings of a `rejection` stage."""

    kind: Literal["rejection"] = resolved("rejection")
    rows: str | None = resolved(None)
    """The rows to sample, such as train[0:1000]. Off: the rows its policy was trained on."""
    samples: int = identity(8, ge=1)
    """Rollouts per row."""
    temperature: float = identity(1.0, gt=0)
    """Of the sampling."""
    max_completion_length: int = identity(512, ge=1)
    """Tokens a completion may have, the prefix not counted."""
    keep: Keep = identity(Keep())
    """Which of them become data."""


def run(job: Job) -> Result:
    """Write data/rows.jsonl (what is kept) and rollouts/rollouts.jsonl (all of them)."""
    from stages import prefix, ranks, rollouts, tokens
    from stages.metrics import MetricsLog
    from stages.sampling import Decoding

    config, out, log = RejectionConfig.model_validate(job.config), Path(job.out), MetricsLog(Path(job.out))
    assert job.rows is not None, "the plan gives rejection its rows"
    player = rollouts.player(job)
    rows = player.rows(job.rows)
    decoding = Decoding(config.temperature, config.max_completion_length, config.samples)
    groups = player.play(rows, decoding, lambda done: log.write(done, len(rows)))
    if not ranks.first():
        return Result(outputs={}, metrics={})
    chosen = [select(group, config.keep, player.problem) for group in groups]
    kept = [
        _token_row(row, i, group[i], job.seed)
        for row, group, picks in zip(rows, groups, chosen, strict=True)
        for i in picks
    ]
    format = player.seen_format()
    tokens.write(out / "data", kept, prefix.card(player.tokenizer, format))
    _write_rollouts(out / "rollouts" / "rollouts.jsonl", rows, groups, chosen)
    judgements = [rollout.judgement for group in groups for rollout in group]
    metrics = {
        "rows": len(rows),
        "rollouts": len(judgements),
        "kept": len(kept),
        "pass_rate": sum(player.problem.passed(judgement.score) for judgement in judgements) / len(judgements),
        "score": sum(judgement.score for judgement in judgements) / len(judgements),
    }
    return Result(outputs={"data": "data", "rollouts": "rollouts"}, metrics=metrics, format=format)


def _token_row(row: Row, sample: int, rollout: Rollout, seed: int) -> TokenRow:
    """A rollout as it was sampled."""
    from stages.tokens import TokenRow

    (prompt, prompt_roles), (answer, answer_roles) = rollout.prompt, rollout.answer
    provenance = {"sample": sample, "score": rollout.judgement.score, "seed": seed}
    return TokenRow(row.id, [*prompt, *answer], prompt_roles + answer_roles, provenance)


def select(group: Sequence[Rollout], keep: Keep, problem: Problem) -> list[int]:
    """Which rollouts of one row are kept, as indices in the order they were sampled. A completion that says the same ids twice counts once, and
    one that was cut before its turn end is never kept."""
    passed = sum(problem.passed(rollout.judgement.score) for rollout in group) / len(group)
    low, high = keep.pass_rate or (0.0, 1.0)
    if not low <= passed <= high:
        return []
    distinct = {tuple(rollout.answer[0]): i for i, rollout in reversed(list(enumerate(group)))}
    good = [i for i in distinct.values() if group[i].finished and group[i].judgement.score >= keep.min_score]
    best_first = sorted(good, key=lambda i: (-group[i].judgement.score, i))
    return sorted(best_first[: keep.per_prompt])


def _write_rollouts(
    path: Path, rows: Sequence[Row], groups: Sequence[Sequence[Rollout]], chosen: Sequence[Sequence[int]]
) -> None:
    from stages.rollouts import line

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row, group, picks in zip(rows, groups, chosen, strict=True):
            for i, rollout in enumerate(group):
                file.write(json.dumps({**line(row.id, i, rollout), "kept": i in picks}) + "\n")
