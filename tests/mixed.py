"""A grpo trainer with general rows on the small model, for tests, in however many processes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from safetensors.torch import save_file
from trl.trainer.grpo_config import GRPOConfig

from stages.problems.base import Judgement, Row
from stages.rewards.compose import Rewards
from stages.runtime import ranks
from stages.trl.likelihood import General, MixedGRPOTrainer
from stages.trl.prefill import prefilled
from stages.trl.rewarding import Judging, RewardedGRPOTrainer
from tests.models import make_model, make_tokenizer, token_rows

ROWS = token_rows()
RATE, COEFFICIENT = 0.5, 0.3


class Variety:
    """How many different ids a completion has; or nothing, for which GRPO moves nothing."""

    def __init__(self, pays: bool) -> None:
        self.pays = pays

    def judge(self, answers):
        values = [float(len(set(answer.ids))) if self.pays else 0.0 for answer in answers]
        return [Judgement(0.0, "none", False, True, {"variety": value}) for value in values]


def trained(out, general=True, pays=True, a_step=4, steps=1, resume=None, rows=ROWS, **settings):
    """(trainer, parameters) after so many steps of SGD."""
    settings = {
        "per_device_train_batch_size": 8 // ranks.world(),
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": steps,
        "learning_rate": RATE,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        **settings,
    }
    if ranks.world() > 1:
        settings["ddp_backend"] = "gloo"
    tokenizer = make_tokenizer()
    prompts = [prefilled([{"role": "user", "content": f"What is {i} + 1?"}], "") for i in range(16)]
    more = {"general": General(rows[: a_step * 4], a_step, COEFFICIENT, seed=3)} if general else {}
    trainer = (MixedGRPOTrainer if general else RewardedGRPOTrainer)(
        judging=Judging(
            cast(Any, Variety(pays)),
            [Row(str(i), "") for i in range(16)],
            {"variety": 1.0},
            Rewards(),
            frozenset(),
            None,
        ),
        model=make_model(tokenizer),
        args=GRPOConfig(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list([{"prompt": prompt, "row": i} for i, prompt in enumerate(prompts)]),
        processing_class=tokenizer,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return trainer, {name: parameter.detach().clone() for name, parameter in parameters}


def main(out: Path) -> None:
    """The parameters after a step with rewards that are all alike, in however many processes there are."""
    for a_step in (3, 4):
        found = trained(
            out,
            pays=False,
            a_step=a_step,
            per_device_train_batch_size=4 // ranks.world(),
            gradient_accumulation_steps=2,
            steps_per_generation=2,
        )
        if ranks.first():
            save_file(found[1], out / f"{a_step}.safetensors")
