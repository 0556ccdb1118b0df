"""What sft and grpo have in common: the settings of any training, and their translation to TRL's names, in one
place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, model_validator

from stages import trl_settings
from stages.config import StageConfig, execution, identity, identity_if_set, seconds
from stages.errors import BadInput
from stages.job import Finding, Job

if TYPE_CHECKING:
    import torch

SHARDING = ("FSDP", "DEEPSPEED")
"""What an accelerate config may ask for that must not silently become something else."""
NO_MIX = "no"
"""accelerate's word for arithmetic in the weights' own dtype, the only one that trains here."""


def _steps_or_time(value: int | str | None) -> int | str | None:
    if isinstance(value, int):
        good = value > 0
    else:
        good = value is None or isinstance(seconds(value), float)
    if not good:
        raise ValueError(f'found {value!r}, expected a number of steps such as 50, or a time such as "10m"')
    return value


class TrainingConfig(StageConfig):
    """Settings of a stage that trains."""

    TRANSLATED: ClassVar[dict[str, str]] = {
        "learning_rate": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "warmup_steps": "warmup_steps",
        "weight_decay": "weight_decay",
        "max_grad_norm": "max_grad_norm",
    }
    """Our field -> TRL's."""

    TRL_CLASS: ClassVar[str]
    """The class of TRL that takes the settings."""

    REFUSED: ClassVar[dict[str, str]] = {}
    """Names of TRL that cannot be passed to this kind of stage, in addition to those of `trl_settings`, and what to do
    instead."""

    WORDS: ClassVar[dict[str, tuple[str | bool, ...]]] = {}
    """Name of TRL -> all that it may be."""

    learning_rate: float = identity(gt=0)
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = identity("cosine")
    """How the learning rate falls after the warm-up."""
    warmup_steps: float = identity(0.05, ge=0)
    """Optimiser steps of linear warm-up; below 1, a share of all steps. 0 = off."""
    weight_decay: float = identity(0.0, ge=0)
    """AdamW's weight decay. 0 = off (TRL's default)."""
    max_grad_norm: float = identity(1.0, ge=0)
    """Gradients are scaled down to this norm. 0 = off. TRL's default."""
    save_every: Annotated[int | str | None, AfterValidator(_steps_or_time)] = execution("10m")
    """How often a resume checkpoint is written: optimiser steps (50), or a time ("10m"). Off: only when the stage is
    asked to stop."""
    keep_last: int = execution(2, ge=1)
    """How many resume checkpoints are kept until the stage is published."""
    drop_overlap: bool = identity_if_set(False)
    """Leave out rows that ask what policies are evaluated on (`stages.data.overlap`). Off: they are counted before the
    stage runs, and it is refused where they ask more than 5 % of the evaluated rows."""
    trl: dict[str, Any] = identity({})
    """Further settings, passed unchanged to SFTConfig or GRPOConfig (docs/trl.md says which may be). Off: none."""

    @model_validator(mode="after")
    def _trl_names_are_free(self) -> TrainingConfig:
        ours = {trl_name: f"set the stage's own {field} instead" for field, trl_name in self.TRANSLATED.items()}
        for refusal in trl_settings.refusals(self.trl, {**ours, **self.REFUSED}, self.WORDS):
            raise ValueError(refusal)
        return self


def accumulation(batch: int, job: Job) -> tuple[int, int]:
    """(micro-batch, accumulation steps) that make up a step's batch in this execution. Raises BadInput on a
    remainder."""
    processes = job.execution.processes
    micro = job.execution.micro_batch or batch // processes
    if not micro or batch % (micro * processes):
        raise BadInput(
            f"{job.name}: a batch of {batch} does not divide into {processes} processes x micro_batch {micro}"
        )
    return micro, batch // (micro * processes)


def refuse_unknown_settings(stage: str, config: TrainingConfig) -> None:
    """Raise BadInput for a name in a stage's `trl` that this version of TRL does not know."""
    import trl

    known = getattr(trl, config.TRL_CLASS).__dataclass_fields__
    if unknown := sorted(set(config.trl) - set(known)):
        raise BadInput(
            f"stages.{stage}.trl.{unknown[0]}: {config.TRL_CLASS} of trl {trl.__version__} has no such setting"
        )


def only_warm_up(stage: str, config: TrainingConfig, steps: int) -> Iterator[Finding]:
    """A training that ends within its warm-up, whose first step has a learning rate of 0."""
    warm_up = config.warmup_steps
    if warm_up < 1:
        warm_up = math.ceil(steps * warm_up)
    if steps <= warm_up:
        yield Finding(
            rule="only_warm_up",
            severity="warn",
            stage=stage,
            evidence={"steps": steps, "warmup_steps": warm_up},
            advice=f"{steps} optimiser steps do not go beyond the {warm_up:g} of the warm-up, whose first has a "
            f"learning rate of 0; run more steps, or set warmup_steps to 0",
            override=f"stages.{stage}.warmup_steps=0",
        )


def trl_arguments(job: Job, config: TrainingConfig, device: torch.device, config_class: type[Any], **more: Any) -> Any:
    """An SFTConfig or GRPOConfig. Every setting that is not neutral is written here, not left to a default.

    Raises BadInput for a name in `trl` that this version of TRL does not know, and for settings that it refuses.
    """
    import trl

    refuse_unknown_settings(job.name, config)
    on_cpu = device.type == "cpu"
    settings = {
        "output_dir": job.work,
        "seed": job.seed,
        "data_seed": job.seed,
        "use_cpu": on_cpu,
        "bf16": False,  # autocast; weights are in model.dtype, and so is what is computed with them
        "fp16": False,
        "ddp_backend": "gloo" if on_cpu and job.execution.processes > 1 else None,
        "gradient_checkpointing": not on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **{trl_name: getattr(config, field) for field, trl_name in config.TRANSLATED.items()},
        **more,
        **config.trl,
    }
    try:
        return config_class(**settings)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"stages.{job.name}: {config_class.__name__} of trl {trl.__version__} refuses its settings: {error}"
        ) from None


def same_world(trainer: Any, job: Job) -> None:
    """Raise BadInput when the trainer runs in another world than the job is for: with another number of processes
    (`accelerate launch --cpu` runs one, and says nothing), or in another way than the accelerate config says (on a
    CPU, FSDP becomes plain data parallelism)."""
    if (seen := trainer.args.world_size) != job.execution.processes:
        raise BadInput(
            f"{job.name}: the job is for {job.execution.processes} processes, but the trainer sees {seen}; look at "
            f"launch.accelerate"
        )
    if job.execution.accelerate is None:
        return
    wanted = (yaml.safe_load(Path(job.execution.accelerate).read_text(encoding="utf-8")) or {}).get("distributed_type")
    got = str(trainer.accelerator.distributed_type.value)
    if wanted in SHARDING and wanted != got:
        raise BadInput(
            f"{job.name}: launch.accelerate asks for {wanted}, but accelerate made it {got} here; {wanted} needs GPUs"
        )


def same_arithmetic(trainer: Any, job: Job) -> None:
    """Raise BadInput when the trainer computes in another way than the recipe says, as an accelerate config can ask:
    in mixed precision, which makes float32 masters under FSDP and none elsewhere, or compiled. No key holds either."""
    state = trainer.accelerator.state
    if state.mixed_precision != NO_MIX:
        raise BadInput(
            f"{job.name}: mixed precision is not supported (found mixed_precision {state.mixed_precision}, expected "
            f"no). Fix: set it to no in launch.accelerate; model.dtype, {job.dtype} here, is the precision of a stage"
        )
    backend = str(state.dynamo_plugin.backend.value).lower()
    if backend != "no":
        raise BadInput(
            f"{job.name}: the accelerate config compiles the model (found dynamo_backend {backend}, expected no). "
            "Fix: remove it there"
        )


def all_steps_ran(trainer: Any, expected: int, job: Job) -> None:
    """Raise RuntimeError when TRL ended after another number of optimiser steps; it does so without a word where data
    are short."""
    if (steps := trainer.state.global_step) != expected:
        raise RuntimeError(f"{job.name}: {steps} optimiser steps were run, {expected} were expected")
