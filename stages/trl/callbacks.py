"""What listens to a trainer: the metrics log, and a stop on a loss that is no number. With several processes the first
one listens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stages.job import Job
from stages.runtime.metrics import MetricsLog
from stages.training import same_arithmetic, same_world


class MetricsCallback(TrainerCallback):
    """Writes what TRL logs to the job's metrics, under TRL's names. Raises FloatingPointError when the loss is not
    finite."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line a logged step; the summary at the end of training is left out."""
        values = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        if "loss" not in values:
            return
        self.log.write(state.global_step, state.max_steps, values)
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {state.global_step}; lower the learning rate"
            )


def listen(trainer: Trainer, job: Job) -> None:
    """Let the job's metrics log be the trainer's only voice. Raises BadInput when the trainer runs in another world
    than the job is for, or computes in another precision."""
    same_world(trainer, job)
    same_arithmetic(trainer, job)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MetricsCallback(MetricsLog(Path(job.out))))
