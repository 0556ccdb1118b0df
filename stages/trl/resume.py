"""Exact resume: a trainer that is killed and goes on from a checkpoint ends where it would have ended.

transformers saves model, optimiser, schedule and random state. TRL's further state (the rollouts that are still
to be trained on, where in a generation it is, the tokens it has seen) is added here, in one file a process; `held` and
`take_up` are where more of a trainer's state joins. A checkpoint counts once all processes have written and the first
has sealed it (`stages.runtime.checkpoints`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from stages.config import Config, identity_values, seconds
from stages.errors import StageStopped
from stages.job import Job
from stages.policy import models
from stages.problems import catalog
from stages.runtime import checkpoints, ranks, stopping
from stages.runtime.metrics import say
from stages.training import TrainingConfig, all_steps_ran

PICKLE = "training_args.bin"
"""A pickle of the arguments that transformers writes into every checkpoint; it is never read."""
GO_ON, SAVE, SAVE_AND_STOP = 0, 1, 2


class ExactResume(Trainer):
    """Goes before a TRL trainer in the order of bases: `class Mine(ExactResume, GRPOTrainer)`."""

    out: Path | None = None
    """Where the job logs; None for a trainer on its own, whose checkpoints are complete all the same, and not
    sealed."""
    belongs: checkpoints.Belongs
    """The job and the execution that its checkpoints belong to."""

    def held(self) -> dict[str, Any]:
        """State of this process that transformers does not save: tensors, numbers, strings, and lists and dicts of
        them."""
        state: dict[str, Any] = {"tokens": self._total_train_tokens}
        if hasattr(self, "_buffered_inputs"):
            state |= {"micro_step": self._step, "rollouts": self._rollouts_to_come()}
        return state

    def take_up(self, state: dict[str, Any]) -> None:
        """Take up what `held` gave."""
        self._total_train_tokens = state["tokens"]
        if hasattr(self, "_buffered_inputs"):
            self._step, self._buffered_inputs = state["micro_step"], state["rollouts"]
            self._shuffle_as_often(int(self.state.epoch))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        return self._sampler

    def _shuffle_as_often(self, epochs: int) -> None:
        """TRL's RepeatSampler shuffles at every epoch, from where its generator is: a resumed one would see the first
        epoch's order again."""
        for _ in range(epochs if self._sampler.shuffle else 0):
            torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)

    def _rollouts_to_come(self) -> list[dict[str, Any]] | None:
        """The rollouts that are trained on after this step; None between two generations."""
        cycle = self.args.steps_per_generation * self.num_iterations
        return self._buffered_inputs if self._step % cycle else None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation does not move the random state of training."""
        with random_state_kept():
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes one at every checkpoint; ours is written when a policy is exported."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        checkpoint = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        torch.save(self.held(), checkpoint / _file_of_rank())
        self.accelerator.wait_for_everyone()
        if ranks.first() and self.out is not None:
            (checkpoint / PICKLE).unlink(missing_ok=True)
            checkpoints.save_logs(self.out, checkpoint)
            checkpoints.seal(checkpoint, self.state.global_step, self.belongs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            file = Path(checkpoint, _file_of_rank())
            device: Any = self.args.device
            if device.type == "cpu":
                device = "cpu"  # of several processes it is cpu:0, which torch cannot read
            self.take_up(torch.load(file, map_location=device, weights_only=True))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """After this block Python's, numpy's and torch's generators, on all devices, are where they were before it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _file_of_rank() -> str:
    return f"switchback_{ranks.rank()}.pt"


def asked(job: Job, config: Config) -> str:
    """SHA-256 of what is to be done, wherever it lies and however it is run. `config` is the job's. A second look only:
    checkpoints lie below their step's key, which also knows the bytes of files that are only named here."""
    inputs = {role: Path(models.local_path(path, weights=False)).parts[-2:] for role, path in job.inputs.items()}
    what = job.model_dump(mode="json", include={"kind", "rows", "format", "seed", "dtype", "lora"})
    problem = identity_values(catalog.settings_of(job.problem)) if job.problem else None
    what |= {"config": identity_values(config), "problem": problem, "inputs": inputs}
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def execution(trainer: Trainer) -> dict[str, Any]:
    """The part of the execution that a checkpoint is bound to."""
    args = trainer.args
    kind = str(trainer.accelerator.distributed_type.value)
    return {
        "processes": args.world_size,
        "micro-batch": args.per_device_train_batch_size,
        "device": args.device.type,
        "distribution": kind,
        "mixed precision": str(trainer.accelerator.mixed_precision),
    }


def find(trainer: ExactResume, job: Job, config: TrainingConfig) -> str | None:
    """Where the job can go on, its logs cut back to there; None: at its start. All processes call it. What was found is
    said."""
    trainer.out = Path(job.out)
    trainer.belongs = checkpoints.Belongs(asked(job, config), execution(trainer))
    mine = {0: _newest(trainer, job)} if ranks.first() else {}
    return ranks.together(mine)[0]


def _newest(trainer: ExactResume, job: Job) -> str | None:
    checkpoint, words = checkpoints.newest(Path(job.work), trainer.belongs)
    for text in words:
        say(job, text)
    if checkpoint is None:
        return None
    say(job, f"resumed from {checkpoint.name}")
    checkpoints.restore_logs(checkpoint, Path(job.out))
    return str(checkpoint)


def train(trainer: ExactResume, job: Job, config: TrainingConfig, checkpoint: str | None, expected: int) -> None:
    """Train to the end, with checkpoints on the way. Raises StageStopped when the job was asked to stop, RuntimeError
    when TRL ran another number of optimiser steps than expected."""
    saver = SaveCallback(job, config)
    trainer.add_callback(saver)
    trainer.train(resume_from_checkpoint=checkpoint)
    if saver.stopped:
        raise StageStopped(f"asked to stop; checkpoint-{trainer.state.global_step} was saved")
    all_steps_ran(trainer, expected, job)


class SaveCallback(TrainerCallback):
    """When to save: every so many steps, every so many minutes, and when the job is asked to stop. The first process
    decides for all."""

    def __init__(self, job: Job, config: TrainingConfig) -> None:
        self.stopped = False
        self._job, self._every, self._keep_last = job, seconds(config.save_every), config.keep_last
        self._saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint."""
        decision = _of_first(self._decide(state), args.device)
        control.should_save = control.should_save or decision != GO_ON
        if decision == SAVE_AND_STOP:
            self.stopped = control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """There is one more."""
        self._saved = time.monotonic()
        if ranks.first():
            checkpoints.keep(Path(self._job.work), self._keep_last)
        return control

    def _decide(self, state: TrainerState) -> int:
        if state.global_step >= state.max_steps:
            return GO_ON  # to the end
        if stopping.asked(self._job):
            return SAVE_AND_STOP
        if self._every is None:
            return GO_ON
        if isinstance(self._every, int):
            due = state.global_step % self._every == 0
        else:
            due = time.monotonic() - self._saved >= self._every
        return SAVE if due else GO_ON


def _of_first(decision: int, device: torch.device) -> int:
    """The first process's decision, in all of them."""
    if ranks.world() == 1:
        return decision
    return int(broadcast(torch.tensor([decision], device=device)).item())
