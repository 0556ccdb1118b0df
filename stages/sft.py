"""Supervised fine-tuning with a weight for prompt tokens.

policy + rows of (prompt ids, completion ids) -> policy. The rows are a problem's demonstrations, tokenised here, or what a rejection stage kept,
trained as it was sampled. Cheap to import: torch and trl come with `run`.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from stages.config import identity, resolved
from stages.job import BadInput, Format, Job, Result
from stages.training import TrainingConfig, accumulation, trl_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.tokens import TokenRow

DEMONSTRATIONS = "demonstrations"


class SftConfig(TrainingConfig):
    """Settings of an `sft` stage."""

    TRANSLATED: ClassVar[dict[str, str]] = {**TrainingConfig.TRANSLATED, "epochs": "num_train_epochs"}

    REFUSED: ClassVar[dict[str, str]] = {
        "max_length": "rows are never cut; remove it",
        "completion_only_loss": "set prompt_loss_weight to 0 instead",
        "assistant_only_loss": "set prompt_loss_weight to 0 instead",
        "packing": "it comes in a later version of switchback; remove it",
        "dataloader_drop_last": "every row is trained; remove it",
        "loss_type": "the weighted loss is nll; remove it",
        "label_smoothing_factor": "the weighted loss has no label smoothing; remove it",
        "dataset_kwargs": "switchback prepares the rows; remove it",
    }

    kind: Literal["sft"] = resolved("sft")
    data: str = resolved(DEMONSTRATIONS)
    """What to imitate: `demonstrations` of the problem, or the name of an earlier rejection stage."""
    rows: str | None = resolved(None)
    """Which rows' demonstrations, such as train[0:1000] (the default). Only with data: demonstrations."""
    prompt_loss_weight: float = identity(0.0, ge=0)
    """Loss weight of a prompt token. 0 = completion-only, equal weights = full sequence. It matters for completions that are short next to their
    prompt, and then little (arXiv 2401.13586 section 4, optimum about 0.24); no gain is promised."""
    completion_loss_weight: float = identity(1.0, ge=0)
    """Loss weight of a completion token, response prefix and turn end included."""
    epochs: float = identity(3.0, gt=0)
    """Passes over the rows. TRL's default."""
    rows_per_step: int = identity(32, ge=1)
    """Rows of one optimiser step, over all processes and accumulation."""
    learning_rate: float = identity(2.0e-5, gt=0)
    """Peak learning rate. TRL's default for full fine-tuning."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> SftConfig:
        if self.prompt_loss_weight == self.completion_loss_weight == 0:
            raise ValueError(
                "prompt_loss_weight and completion_loss_weight are both 0, so nothing would be trained; set one above 0"
            )
        if self.rows and self.data != DEMONSTRATIONS:
            raise ValueError(f"rows says which demonstrations to use, but data is {self.data}; remove rows")
        return self


def run(job: Job) -> Result:
    """Train on the data and write the policy to `job.out`. Raises BadInput when there is no row to train on."""
    from datasets import Dataset
    from transformers import set_seed
    from trl.trainer.sft_config import SFTConfig

    from stages import models, prefix, tokens
    from stages.metrics import MetricsLog, last
    from stages.trl.callbacks import listen
    from stages.trl.sft_loss import WeightedSFTTrainer

    config, out = SftConfig.model_validate(job.config), Path(job.out)
    assert job.format is not None, "the plan gives every sft step a Format"
    set_seed(job.seed)
    device = models.pick_device(job.execution)
    path = models.local_path(job.inputs["policy"])
    tokenizer = models.load_tokenizer(path)
    data = tokens.read(Path(job.inputs["data"])) if "data" in job.inputs else demonstrations(job, job.format, tokenizer)
    if not data:
        raise BadInput(
            f"{job.name}: its data has no rows; if a rejection stage kept none, lower keep.min_score or raise samples"
        )
    micro, steps = accumulation(config.rows_per_step, job)
    arguments = trl_arguments(
        job,
        config,
        device,
        SFTConfig,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        max_length=None,
    )
    trainer = WeightedSFTTrainer(
        model=models.load_policy(path, job.dtype),
        args=arguments,
        train_dataset=Dataset.from_list([tokens.labelled(row) for row in data]),
        processing_class=tokenizer,
        prompt_loss_weight=config.prompt_loss_weight,
        completion_loss_weight=config.completion_loss_weight,
    )
    listen(trainer, MetricsLog(out))
    trainer.train()
    expected = math.ceil(config.epochs * math.ceil(len(data) / config.rows_per_step))
    if trainer.state.global_step != expected:
        raise RuntimeError(
            f"{job.name}: {trainer.state.global_step} optimiser steps were run, {expected} were expected"
        )
    models.save_policy(trainer.model, tokenizer, job.format, out)
    metrics = {"steps": expected, "rows": len(data)}
    logged = {name: last(out / "metrics.jsonl", name) for name in ("completion_loss", "prompt_loss", "entropy")}
    metrics |= {name: value for name, value in logged.items() if value is not None}
    return Result(outputs={"policy": "."}, metrics=metrics, format=prefix.seen_format(job.format, tokenizer))


def demonstrations(job: Job, format: Format, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The problem's demonstrations of the job's rows, tokenised with the prefix at their start."""
    from stages import prefix, problems, tokens

    assert job.problem is not None and job.rows is not None, "the plan gives demonstrations a problem and rows"
    problem = problems.load(job.problem)
    rows = problems.rows(problem, job.rows)
    rng = random.Random(f"demonstrations-{job.rows.seed}")
    texts = [problem.demonstration(row, rng) for row in rows]
    prompts = prefix.prompt_ids(tokenizer, [prefix.messages(format, row) for row in rows])
    return [
        tokens.TokenRow(row.id, prompt, prefix.demonstration_ids(tokenizer, format, text))
        for row, prompt, text in zip(rows, prompts, texts, strict=True)
    ]
