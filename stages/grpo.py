"""Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300) with a response prefix, on TRL's GRPOTrainer.

policy + rows of a problem -> policy. Each step samples `group_size` completions for each of `prompts_per_step` rows;
their rewards, centred and scaled within the group, are the advantages. Loss: token-level (`dapo`, arXiv 2503.14476
section 3.3; TRL's default). The KL reference is the policy the stage starts from (with adapters: the same weights,
adapter off). A stage may add general rows to the rollouts (`mix`, docs/mix.md). Cheap to import: `run` imports
torch and trl."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from stages import trl_settings
from stages.config import Config, execution, identity, resolved
from stages.data.mix import Mix, count_of_step
from stages.errors import BadInput
from stages.job import Job, Result, train_rows
from stages.rewards.compose import Rewards, weights_of
from stages.stage import Batch, Earlier, Inspected, Read, Stage
from stages.training import TrainingConfig, accumulation, trl_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.problems.base import Problem
    from stages.tokens.token_rows import TokenRow
    from stages.trl.rewarding import RewardedGRPOTrainer

LOGGED = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "mix/loss",
)
"""TRL's metrics whose last value an artifact shows."""


ROLLOUTS = "rollouts"
"""Output and directory of the log of what training sampled."""


class Kl(Config):
    """How tightly the policy is held to its reference."""

    beta: float = identity(0.001, ge=0)
    """Coefficient of the KL term. 0 = off: no reference is loaded and no KL is logged. 0.001 is often enough; raise it
    when KL explodes."""
    reference: Literal["policy"] = identity("policy")
    """What to stay close to: `policy`, the policy this stage starts from."""


class GrpoMix(Mix):
    """General conversations that a step adds to its rollouts. They have no reward: they are trained by likelihood."""

    coefficient: float = identity(0.1, gt=0)
    """Weight of the mean loss of their completion tokens. The loss of the rollouts has weight 1."""


class GrpoConfig(TrainingConfig):
    """Settings of a `grpo` stage."""

    TRL_CLASS: ClassVar[str] = "GRPOConfig"
    TRANSLATED: ClassVar[dict[str, str]] = {
        **TrainingConfig.TRANSLATED,
        "group_size": "num_generations",
        "temperature": "temperature",
        "max_completion_length": "max_completion_length",
        "epsilon": "epsilon",
        "epsilon_high": "epsilon_high",
    }

    REFUSED: ClassVar[dict[str, str]] = {
        "beta": "set the stage's own kl.beta instead",
        "generation_batch_size": "set the stage's own prompts_per_step instead",
        "steps_per_generation": "set the stage's own prompts_per_step instead",
        "num_train_epochs": "set the stage's own steps instead",
        "generation_kwargs": "what is sampled has to be the policy that is trained; remove it",
        **dict.fromkeys(
            ("top_p", "top_k", "min_p", "repetition_penalty"),
            "what is sampled has to be the policy that is trained; remove it",
        ),
        **dict.fromkeys(
            ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            "the KL reference is the policy this stage starts from; remove it",
        ),
        "reward_weights": "the problem's rewards have their weights; remove it",
        "neftune_noise_alpha": "what is sampled has to be the policy that is trained; remove it",
        "max_tool_calling_iterations": "a completion calls no tools; remove it",
        "train_sampling_strategy": "TRL draws the rows of GRPO in its own way; remove it",
        "length_column_name": "rows have no such column; remove it",
        "dataloader_persistent_workers": "a stage with it does not resume exactly; remove it",
        **dict.fromkeys(
            (
                "entropy_coef",
                "entropy_coef_delta",
                "entropy_coef_max",
                "entropy_coef_min",
                "entropy_target",
                "top_entropy_quantile",
                "use_adaptive_entropy",
            ),
            trl_settings.BY_MICRO_BATCH,
        ),
    }
    WORDS: ClassVar[dict[str, tuple[str | bool, ...]]] = {
        "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none", True, False),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    }

    kind: Literal["grpo"] = resolved("grpo")
    rows: str = resolved()
    """The rows to train on, such as train[0:1000]."""
    steps: int = identity(200, ge=1)
    """Optimiser steps."""
    prompts_per_step: int = identity(16, ge=1)
    """Rows of one step, over all processes and accumulation."""
    group_size: int = identity(8, ge=2)
    """Completions sampled for each row. TRL's default."""
    max_completion_length: int = identity(512, ge=1)
    """Tokens a completion may have, the prefix not counted; a longer one is cut."""
    temperature: float = identity(1.0, gt=0)
    """Of the sampling; other than 1, what is sampled is not the policy that is trained."""
    learning_rate: float = identity(1.0e-6, gt=0)
    """Peak learning rate, an order below SFT's. TRL's default."""
    kl: Kl = identity(Kl())
    """The KL term."""
    rewards: Rewards = identity(Rewards())
    """What is made of the problem's reward components."""
    epsilon: float = identity(0.2, gt=0)
    """The probability ratio is clipped below 1 - epsilon. PPO's and TRL's default; idle where every step samples
    anew."""
    epsilon_high: float = identity(0.28, gt=0)
    """The ratio is clipped above 1 + epsilon_high (clip-higher, arXiv 2503.14476 section 3.1)."""
    mix: GrpoMix | None = identity(None)
    """General conversations that are trained on by likelihood at every step; `share` is of the step's rows, rounded
    up. Off: none."""
    stop_without_signal: int | None = execution(50, ge=1)
    """First optimiser steps after which the stage stops, with exit 3 and nothing published, if no group had two
    different rewards and not every rollout was solved. Off (null): never."""
    audit: bool = execution(True)
    """Before it runs, look at what the rewards pay for (`stages.rewards.audit.audit`), and train nothing where the
    best answers earn less than worse ones. Off: not looked at, for rewards that are dear to ask or that are meant so;
    `switchback audit` still shows it."""

    @model_validator(mode="after")
    def _something_may_overlap(self) -> GrpoConfig:
        if self.drop_overlap and self.mix is None:
            raise ValueError(
                "drop_overlap has no effect without mix, because train rows are never evaluated rows; remove it"
            )
        return self

    @model_validator(mode="after")
    def _losses_have_their_numbers(self) -> GrpoConfig:
        loss = self.trl.get("loss_type")
        if loss == "cispo" and self.epsilon_high <= 1:
            raise ValueError(
                f"trl.loss_type: cispo takes epsilon_high as the cap of the ratio itself, so {self.epsilon_high:g} "
                f"would scale every gradient by it. Fix: set the stage's epsilon_high above 1, such as 5.0"
            )
        if loss == "bnpo":
            raise ValueError(f"trl.loss_type: bnpo: {trl_settings.BY_MICRO_BATCH}, or take dapo")
        return self

    @property
    def general_rows(self) -> int:
        """General rows of one step, over all processes and accumulation."""
        return count_of_step(self.prompts_per_step, self.mix.share) if self.mix else 0


def reads(config: GrpoConfig) -> tuple[Read, ...]:
    """Its mix."""
    return (Read("mix", "mix.data", config.mix.data, None),) if config.mix else ()


def batch(config: GrpoConfig) -> Batch:
    """The completions of one step."""
    size = config.prompts_per_step * config.group_size
    return Batch(size, f"prompts_per_step={config.prompts_per_step} x group_size={config.group_size} (={size})")


def check(config: GrpoConfig, earlier: Earlier, seed: int) -> None:
    """Raise BadInput for rows that are no range of train rows, or fewer than a step takes."""
    rows = train_rows(config.name, config.rows, seed)
    count = rows.stop - rows.start
    if count < config.prompts_per_step:
        raise BadInput(
            f"stages.{config.name}.rows: {rows} has {count} rows, fewer than one generation batch of "
            f"prompts_per_step={config.prompts_per_step}; TRL would train 0 steps. Give it more rows, or lower "
            f"prompts_per_step"
        )


def run(job: Job) -> Result:
    """Train on the problem's rewards and write the policy to `job.out`. Raises RuntimeError when TRL ran another
    number of steps."""
    from transformers import set_seed

    from stages.data import rollouts
    from stages.guard import failures
    from stages.policy import models, publishing
    from stages.problems import catalog
    from stages.runtime import ranks
    from stages.runtime.metrics import latest
    from stages.sampling.generation_config import own_settings
    from stages.tokens import prefix
    from stages.trl import resume
    from stages.trl.callbacks import listen

    config = GrpoConfig.model_validate(job.config)
    assert job.format is not None and job.problem is not None, "the plan gives grpo both"
    set_seed(job.seed)
    tokenizer = models.load_tokenizer(models.local_path(job.inputs["policy"]), job.format)
    problem, log = catalog.load(job.problem, job.copies), Path(job.out, ROLLOUTS)
    trainer, model = _trainer(job, config, tokenizer, problem, log)
    checkpoint = resume.find(trainer, job, config)
    if ranks.first():
        rollouts.write_card(log, rollouts.card(tokenizer, job, config.temperature, config.max_completion_length))
    listen(trainer, job)
    publishing.refuse_unsaveable(trainer, tokenizer, job)
    with own_settings(model):
        resume.train(trainer, job, config, checkpoint, config.steps)
    published = publishing.publish(trainer, tokenizer, job, lambda: _last_rollouts(trainer, tokenizer, job, log))
    findings = (*trainer.signal.findings(job.name), *published)
    if not ranks.first():
        return Result(outputs={}, metrics={})
    return Result(
        outputs={"policy": ".", ROLLOUTS: ROLLOUTS},
        metrics={"steps": config.steps, "rows": len(trainer.judging.rows), **latest(Path(job.out), LOGGED)},
        findings=(*findings, *failures.found(job.name, problem, (line["failure"] for line in rollouts.read(log)))),
        format=prefix.seen_format(job.format, tokenizer),
    )


def _last_rollouts(
    trainer: RewardedGRPOTrainer, tokenizer: PreTrainedTokenizerBase, job: Job, log: Path
) -> list[list[int]]:
    """Ids of prompt and answer of a few."""
    from stages.data import rollouts
    from stages.policy.as_trained import SAMPLE
    from stages.tokens import prefix

    assert job.format is not None, "the plan gives grpo a Format"
    last = [*rollouts.read(log)][-SAMPLE:]
    row_of = {row.id: row for row in trainer.judging.rows}
    prompts = prefix.prompts(tokenizer, job.format, [row_of[line["row"]] for line in last])
    return [[*ids, *line["ids"]] for (ids, _), line in zip(prompts, last, strict=True)]


def _trainer(
    job: Job, config: GrpoConfig, tokenizer: PreTrainedTokenizerBase, problem: Problem, log: Path
) -> tuple[RewardedGRPOTrainer, PreTrainedModel]:
    """The trainer, and the policy as it was loaded: with adapters the trainer has it inside another model."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig

    from stages.policy import lora, models
    from stages.problems import catalog
    from stages.sampling import turn_ends
    from stages.tokens import prefix
    from stages.trl.prefill import prefilled
    from stages.trl.rewarding import Judging

    assert job.format is not None and job.rows is not None, "the plan gives grpo both"
    rows = catalog.rows(problem, job.rows)
    micro, steps = accumulation(config.prompts_per_step * config.group_size, job)
    weights = weights_of(job.name, config.rewards, problem.reward_weights)
    arguments = trl_arguments(
        job,
        config,
        models.pick_device(job.execution),
        GRPOConfig,
        max_steps=config.steps,
        beta=config.kl.beta,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        steps_per_generation=steps,
        reward_weights=[*weights.values()],
    )
    kind = _kind(job, config, tokenizer)
    path = models.local_path(job.inputs["policy"])  # where TRL loads the KL reference from
    model = models.load_policy(path, job.dtype, adapters=job.lora)
    prompts = [prefilled(prefix.messages(job.format, row), prefix.of_row(job.format, row)) for row in rows]
    ends = turn_ends(tokenizer, model.generation_config)
    trainer = kind(
        judging=Judging(problem, rows, weights, config.rewards, ends, log, config.stop_without_signal),
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt, "row": i} for i, prompt in enumerate(prompts)]),
        processing_class=tokenizer,
        peft_config=lora.peft_config(job.lora) if job.lora else None,
    )
    trainer.own_positions = job.own_positions
    return trainer, model


def _kind(job: Job, config: GrpoConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[..., RewardedGRPOTrainer]:
    """The trainer of rollouts, or of rollouts and general rows."""
    from stages.trl.likelihood import General, MixedGRPOTrainer
    from stages.trl.rewarding import RewardedGRPOTrainer

    if config.mix is None:
        return RewardedGRPOTrainer
    rows = _general(job, config, tokenizer)
    return partial(MixedGRPOTrainer, general=General(rows, config.general_rows, config.mix.coefficient, job.seed))


def _general(job: Job, config: GrpoConfig, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The rows of its mix, for all steps."""
    from stages.data import sources

    assert job.format is not None, "the plan gives grpo a Format"
    a_step = config.general_rows
    return sources.general_of_steps(job, job.format, tokenizer, a_step, config.steps, config.drop_overlap)


def preflight(job: Job, config: GrpoConfig, tokenizer: PreTrainedTokenizerBase, path: str) -> Inspected:
    """Read the rows of its mix, and look whether rollouts are scored as they are sampled."""
    from stages.trl import apart

    _refuse_stretched(job, config, tokenizer, path)
    general = _general(job, config, tokenizer) if config.mix else ()
    return Inspected(general=general, steps=config.steps, findings=[*apart.grpo(job, path)])


def _refuse_stretched(job: Job, config: GrpoConfig, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise BadInput for completions so long that they change the positions of other completions in their batch."""
    from transformers import AutoConfig

    from stages.policy.positions import longest_exact
    from stages.problems import catalog
    from stages.tokens import prefix
    from stages.trl import apart

    assert job.format is not None and job.rows is not None and job.problem is not None, "the plan gives grpo all"
    if longest_exact(AutoConfig.from_pretrained(path, trust_remote_code=False)) is None:
        return
    rows = catalog.rows(catalog.load(job.problem, job.copies), job.rows)
    prompts = prefix.prompts(tokenizer, job.format, rows)
    starts = [prefix.prefix_ids(tokenizer, prefix.of_row(job.format, row)) for row in rows]
    longest = max(len(ids) + len(start) for (ids, _), start in zip(prompts, starts, strict=True))
    longest += config.max_completion_length
    apart.refuse_stretched(f"stages.{job.name}", path, longest, "lower max_completion_length, or choose shorter rows")


STAGE = Stage(
    config=GrpoConfig,
    run=run,
    version=2,
    trains=True,
    saves=True,
    pads_left=True,
    makes=lambda config: ("policy", ROLLOUTS),
    reads=reads,
    rows=lambda config, earlier: config.rows,
    rewards=lambda config: config.rewards,
    audited=lambda config: config.audit,
    drops_overlap=lambda config: config.drop_overlap,
    batch=batch,
    check=check,
    preflight=preflight,
)
