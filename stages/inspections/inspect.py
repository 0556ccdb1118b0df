"""One row of an sft stage as it will be trained: its loss map. Needs a tokenizer and nothing else."""

from __future__ import annotations

from pathlib import Path

from stages.config import Config, identity
from stages.errors import BadInput
from stages.job import Job, Result


class InspectConfig(Config):
    """What to look at."""

    stage: dict[str, object] = identity()
    """The sft stage's Config."""
    row: int = identity(0, ge=0)
    """Which of its rows, from 0; those of its mix come after its own."""


def run(job: Job) -> Result:
    """Write the row's loss map to `job.out`. Raises BadInput when there is no such row."""
    from stages.data import sources
    from stages.policy import models
    from stages.sft import SftConfig, row_metrics
    from stages.tokens import loss_map, prefix

    config = InspectConfig.model_validate(job.config)
    stage = SftConfig.model_validate(config.stage)
    assert job.format is not None, "the plan gives every sft step a Format"
    tokenizer = models.load_tokenizer(models.local_path(job.inputs["policy"], weights=False), job.format)
    loaded = sources.load(job, job.format, tokenizer, stage.mix, stage.drop_overlap)
    rows = loaded.all
    if config.row >= len(rows):
        raise BadInput(f"{job.name} has {len(rows)} rows, so there is no row {config.row}; rows count from 0")
    loss_map.write(Path(job.out), loss_map.of_row(rows[config.row], stage.weights, tokenizer))
    return Result(
        outputs={"map": loss_map.FILE},
        metrics=row_metrics(loaded, stage.weights),
        format=prefix.seen_format(job.format, tokenizer),
    )
