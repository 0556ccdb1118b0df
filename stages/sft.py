"""Supervised fine-tuning with a loss weight for every token, by its role.

policy + token rows -> policy. The rows are a problem's demonstrations or a file of conversations, tokenised here, or
what a rejection stage kept, trained as it was sampled (`stages.data.sources`). A stage may add general
conversations (`mix`). Cheap to import: torch and trl come with `run`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import model_validator

from stages.config import Config, UserPath, execution, identity, resolved
from stages.data.mix import Mix
from stages.errors import BadInput
from stages.job import Finding, Job, Result, train_rows
from stages.rejection import CONTROL, RejectionConfig
from stages.stage import ROWS, Batch, Earlier, Inspected, Read, Stage
from stages.tokens.token_rows import ANSWERED, ROLES, TokenRow, lengths
from stages.tokens.weights import Normaliser, answered_a_step, prompt_share, row_weights, total_weight
from stages.training import TrainingConfig, accumulation, trl_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig

    from stages.data.sources import Rows

DEMONSTRATIONS = "demonstrations"
DEFAULT_DEMONSTRATIONS = "train[0:1000]"
"""The rows whose demonstrations are trained on where `rows` is not set."""


class LossWeights(Config):
    """A weight for a single role. Off: the prompt's or completion's weight."""

    system: float | None = identity(None, ge=0)
    """Words of the system prompt."""
    user: float | None = identity(None, ge=0)
    """Words of the user's turns."""
    template: float | None = identity(None, ge=0)
    """What the chat template puts around them, up to and including the generation prompt."""
    prefix: float | None = identity(None, ge=0)
    """The response prefix."""
    completion: float | None = identity(None, ge=0)
    """The answer after the prefix, and the token that ends the turn."""


class Packing(Config):
    """Several rows in one sequence, as TRL packs them."""

    strategy: Literal["bfd", "bfd_split", "wrapped"] = identity("bfd")
    """bfd: rows stay whole, best fit first. bfd_split: rows longer than a sequence are split. wrapped: rows one after
    another, cut where a sequence is full, and each sees the one before it."""
    max_length: int = identity(2048, ge=2)
    """Tokens of a sequence."""


class SftConfig(TrainingConfig):
    """Settings of an `sft` stage."""

    TRL_CLASS: ClassVar[str] = "SFTConfig"
    TRANSLATED: ClassVar[dict[str, str]] = {**TrainingConfig.TRANSLATED, "epochs": "num_train_epochs"}

    REFUSED: ClassVar[dict[str, str]] = {
        "max_length": "rows are never cut; set the stage's own packing.max_length to pack them",
        "completion_only_loss": "set prompt_loss_weight to 0 instead",
        "assistant_only_loss": "set prompt_loss_weight to 0 instead",
        "packing": "set the stage's own packing instead",
        "packing_strategy": "set the stage's own packing instead",
        "padding_free": "set the stage's own padding_free instead",
        "loss_type": "the weighted loss is nll; remove it",
        "chat_template_path": "set the stage's own format.chat_template instead",
        "eos_token": "rows end as the chat template ends a turn; remove it",
        "pad_token": "the tokenizer's is used; remove it",
        "truncation_mode": "rows are never cut; remove it",
        "length_column_name": "rows have no such column; remove it",
        "dataset_text_field": "data says what a line may be; remove it",
        "dataset_kwargs": "switchback prepares the rows; remove it",
        "dataset_num_proc": "switchback prepares the rows; remove it",
    }
    WORDS: ClassVar[dict[str, tuple[str | bool, ...]]] = {
        "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    }

    kind: Literal["sft"] = resolved("sft")
    data: UserPath = resolved(DEMONSTRATIONS)
    """What to imitate: `demonstrations` of the problem, the name of an earlier rejection stage, or the path of a
    .jsonl file of conversations, identified by its bytes (`stages.data.sources` says what a line may be)."""
    rows: str | None = resolved(None)
    """Which rows' demonstrations, such as train[0:1000] (the default). Only with data: demonstrations."""
    prompt_loss_weight: float = identity(0.0, ge=0)
    """Loss weight of a prompt token: words of system and user, and what the template puts around them. 0 =
    completion-only, equal weights = full sequence. It matters for completions that are short next to their prompt, and
    then little (arXiv 2401.13586 section 4, optimum about 0.24); no gain is promised."""
    completion_loss_weight: float = identity(1.0, ge=0)
    """Loss weight of a completion token: response prefix, answer and turn end; in a conversation, those of every
    assistant turn."""
    loss_weights: LossWeights = identity(LossWeights())
    """Weights of single roles, in place of the two above."""
    normaliser: Normaliser = identity("weight_sum")
    """What the weighted sum is divided by (docs/loss.md): weight_sum, a weighted mean; nonzero_count (arXiv
    2507.07817); completion_count, which of a step without a completion token is the stage's mean a step."""
    packing: Packing | None = identity(None)
    """Put several rows into one sequence; `rows_per_step` then counts sequences. Off: a row is a sequence."""
    padding_free: bool = execution(False)
    """Lay the rows of a micro-batch end to end in place of padding them. The gradient is the same: a model whose rows
    would see each other is refused. On a GPU it is fast with FlashAttention."""
    mix: Mix | None = identity(None)
    """General conversations that are trained on in addition to the stage's own rows (docs/mix.md). Off: none."""
    epochs: float = identity(3.0, gt=0)
    """Passes over the rows. TRL's default."""
    rows_per_step: int = identity(32, ge=1)
    """Rows of one optimiser step, over all processes and accumulation."""
    learning_rate: float = identity(2.0e-5, gt=0)
    """Peak learning rate. TRL's default for full fine-tuning."""

    @property
    def weights(self) -> dict[str, float]:
        """Role -> weight."""
        by_part = {
            role: self.completion_loss_weight if letter in ANSWERED else self.prompt_loss_weight
            for role, letter in ROLES.items()
        }
        return by_part | self.loss_weights.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _sequences_are_of_one_kind(self) -> SftConfig:
        if self.padding_free and self.packing and self.packing.strategy == "wrapped":
            raise ValueError("padding_free keeps rows apart and packing.strategy wrapped does not; remove one of them")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> SftConfig:
        if not any(self.weights.values()):
            raise ValueError(
                "prompt_loss_weight and completion_loss_weight are both 0, so nothing would be trained; set one above 0"
            )
        if self.rows and self.data != DEMONSTRATIONS:
            raise ValueError(f"rows says which demonstrations to use, but data is {self.data}; remove rows")
        return self


def reads(config: SftConfig) -> tuple[Read, ...]:
    """Its data, where they are no demonstrations, and its mix."""
    found: list[Read] = []
    if config.data.endswith(ROWS):
        found.append(Read("data", "data", config.data, None))
    elif config.data != DEMONSTRATIONS:
        name, _, output = config.data.partition(":")
        found.append(Read("data", "data", name, output or "data", instead=(DEMONSTRATIONS,)))
    if config.mix:
        found.append(Read("mix", "mix.data", config.mix.data, None))
    return tuple(found)


def rows(config: SftConfig, earlier: Earlier) -> str | None:
    """The rows whose demonstrations it trains on."""
    if config.data != DEMONSTRATIONS:
        return None
    return config.rows or DEFAULT_DEMONSTRATIONS


def check(config: SftConfig, earlier: Earlier, seed: int) -> None:
    """Raise BadInput for an output that its rejection stage does not make, and for rows that are no range of train
    rows."""
    name, colon, output = config.data.partition(":")
    if colon and not config.data.endswith(ROWS):
        maker = earlier.get(name)
        where = f"stages.{config.name}.data"
        if output != CONTROL:
            raise BadInput(f"{where}: found {config.data}, but a stage trains on {name} or {name}:{CONTROL}")
        if not isinstance(maker, RejectionConfig) or maker.control is None:
            raise BadInput(f"{where}: there is no {config.data}; a rejection stage with control: random makes one")
    if config.rows is not None:
        train_rows(config.name, config.rows, seed)


def run(job: Job) -> Result:
    """Train on the data and write the policy to `job.out`. Raises BadInput when there is no row to train on."""
    from datasets import Dataset
    from transformers import set_seed

    from stages.data import sources
    from stages.policy import lora, models, publishing
    from stages.runtime import ranks
    from stages.runtime.metrics import latest
    from stages.tokens import loss_map, prefix, token_rows
    from stages.trl import resume
    from stages.trl.callbacks import listen
    from stages.trl.sft_loss import WeightedSFTTrainer

    config, out = SftConfig.model_validate(job.config), Path(job.out)
    assert job.format is not None, "the plan gives every sft step a Format"
    set_seed(job.seed)
    path = models.local_path(job.inputs["policy"])
    models.refuse_vision(path)
    tokenizer = models.load_tokenizer(path, job.format)
    loaded = sources.load(job, job.format, tokenizer, config.mix, config.drop_overlap)
    trained = loaded.all
    refuse_stretched(job, config, path, trained)
    trainer = WeightedSFTTrainer(
        model=models.load_policy(path, job.dtype, adapters=job.lora),
        args=_arguments(job, config, trained),
        train_dataset=Dataset.from_list([token_rows.labelled(row) for row in trained]),
        processing_class=tokenizer,
        peft_config=lora.peft_config(job.lora) if job.lora else None,
        weights=config.weights,
        normaliser=config.normaliser,
    )
    checkpoint = resume.find(trainer, job, config)
    listen(trainer, job)
    publishing.refuse_unsaveable(trainer, tokenizer, job)
    packed = len(cast(Sized, trainer.train_dataset))
    expected = optimiser_steps(config, packed)
    trainer.answered_a_step = answered_a_step(trained, config.epochs, expected)
    resume.train(trainer, job, config, checkpoint, expected)
    findings = (
        *ragged(job, config, packed),
        *publishing.publish(trainer, tokenizer, job, lambda: [row.ids for row in trained]),
    )
    if ranks.first():
        loss_map.write(out, loss_map.of_row(trained[0], config.weights, tokenizer))
    metrics = {
        "steps": expected,
        "sequences": packed,
        **row_metrics(loaded, config.weights),
    }
    metrics |= latest(out, ("completion_loss", "prompt_loss", "entropy"))
    return Result(
        outputs={"policy": "."}, metrics=metrics, findings=findings, format=prefix.seen_format(job.format, tokenizer)
    )


def _arguments(job: Job, config: SftConfig, rows: Sequence[TokenRow]) -> SFTConfig:
    """TRL's arguments: the stage's settings, as the job wants them executed."""
    from trl.trainer.sft_config import SFTConfig

    from stages.policy import models

    micro, steps = accumulation(config.rows_per_step, job)
    return trl_arguments(
        job,
        config,
        models.pick_device(job.execution),
        SFTConfig,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        **sequences(config, rows),
    )


def row_metrics(rows: Rows, weights: dict[str, float]) -> dict[str, float]:
    """How many rows there are, what they weigh (`ratio`), and, where there is a mix, how many are of it and the share
    of the total weight that they carry: a few long answers can be most of the loss."""
    found = {"rows": float(len(rows.all)), **ratio(rows.all, weights)}
    if rows.dropped:
        found["overlap_dropped"] = float(rows.dropped)
    if not rows.general:
        return found
    own, general = total_weight(rows.own, weights), total_weight(rows.general, weights)
    share = general / (own + general) if own + general else 0.0
    return {**found, "mix_rows": float(len(rows.general)), "mix_weight_share": share}


def sequences(config: SftConfig, rows: Sequence[TokenRow]) -> dict[str, Any]:
    """How rows become sequences, in TRL's words. Raises BadInput for a row that best-fit packing would cut."""
    if config.packing is None:
        return {"max_length": None, "padding_free": config.padding_free}
    longest = max(len(row.ids) for row in rows)
    if config.packing.strategy == "bfd" and longest > config.packing.max_length:
        raise BadInput(
            f"stages.{config.name}.packing: a row has {longest} tokens, but packing.max_length is "
            f"{config.packing.max_length} and bfd would cut it; raise max_length, or choose bfd_split"
        )
    packing = {"packing": True, "packing_strategy": config.packing.strategy, "max_length": config.packing.max_length}
    return {**packing, "padding_free": config.padding_free}


def laid_end_to_end(config: SftConfig) -> str | None:
    """The field that lays rows end to end and still keeps them apart; None where no field does."""
    if config.padding_free:
        return "padding_free"
    return "packing" if config.packing and config.packing.strategy != "wrapped" else None


def refuse_stretched(job: Job, config: SftConfig, path: str, rows: Sequence[TokenRow]) -> None:
    """Raise BadInput for rows so long that they change the positions of other rows in their batch."""
    from stages.trl import apart

    field = laid_end_to_end(config)
    if field is None and job.execution.micro_batch == 1:
        return
    advice = f"remove {field}, and set launch.micro_batch to 1" if field else "set launch.micro_batch to 1"
    apart.refuse_stretched(f"stages.{job.name}", path, max(len(row.ids) for row in rows), advice)


def optimiser_steps(config: SftConfig, count: int) -> int:
    """Steps that `count` sequences make; the last of an epoch may be short."""
    return math.ceil(config.epochs * math.ceil(count / config.rows_per_step))


def ragged(job: Job, config: SftConfig, packed: int) -> Iterator[Finding]:
    """Packed sequences that several processes do not share out evenly."""
    if config.packing and job.execution.processes > 1 and packed % config.rows_per_step:
        yield Finding(
            rule="ragged_batch",
            severity="warn",
            stage=job.name,
            evidence={"sequences": packed, "rows_per_step": config.rows_per_step},
            advice=f"packing makes {packed} sequences, which do not divide by rows_per_step={config.rows_per_step}; "
            f"the last step of an epoch repeats some of them",
        )


def ratio(rows: Sequence[TokenRow], weights: dict[str, float]) -> dict[str, float]:
    """R_g, completion tokens / prompt tokens (arXiv 2401.13586 section 3), and the share of the total weight that
    prompt tokens carry."""
    prompt, answered = lengths(rows)
    return {
        "generation_ratio": answered / prompt if prompt else 0.0,
        "prompt_weight_share": prompt_share(rows, weights),
    }


def preflight(job: Job, config: SftConfig, tokenizer: PreTrainedTokenizerBase, path: str) -> Inspected:
    """Read the rows, as far as they are there. Raises BadInput for rows that cannot be trained on."""
    from stages.data import sources
    from stages.policy import models
    from stages.trl import apart

    models.refuse_vision(path)
    findings = [*apart.sft(job, path, laid_end_to_end(config))]
    assert job.format is not None, "the plan gives every sft step a Format"
    if job.problem is None and "data" not in job.inputs:  # another stage makes them, and has not run
        if config.mix:
            sources.look_at_general(job, job.format, tokenizer)
        return Inspected(findings=findings)
    loaded = sources.load(job, job.format, tokenizer, config.mix, config.drop_overlap)
    sequences(config, loaded.all)
    refuse_stretched(job, config, path, loaded.all)
    if not any(weight for row in loaded.all for weight in row_weights(row, config.weights)):
        raise BadInput(
            f"{job.name}: no token of its {len(loaded.all)} rows has a weight above 0, so nothing would be trained; "
            f"look at loss_weights"
        )
    steps = None if config.packing else optimiser_steps(config, len(loaded.all))
    findings += generation_ratio(job.name, config, loaded.all)
    return Inspected(loaded.own, loaded.general, findings, steps)


def generation_ratio(stage: str, config: SftConfig, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Prompt weights that carry most of the loss, or that hardly can matter."""
    evidence = ratio(rows, config.weights)
    by_number = not any(getattr(config.loss_weights, role) for role in ("system", "user", "template"))
    prompt_is_weighted = evidence["prompt_weight_share"] > 0
    if evidence["prompt_weight_share"] > 0.5:
        yield Finding(
            rule="prompt_weight_share",
            severity="warn",
            stage=stage,
            evidence=evidence,
            advice=f"prompt tokens carry {evidence['prompt_weight_share']:.0%} of the loss, so the stage mostly "
            f"learns prompts; lower the prompt's weight",
            override=f"stages.{stage}.prompt_loss_weight={0.5 * config.prompt_loss_weight:g}" if by_number else None,
            source="arXiv 2401.13586",
        )
    if prompt_is_weighted and evidence["generation_ratio"] > 1:
        yield Finding(
            rule="generation_ratio",
            severity="warn",
            stage=stage,
            evidence=evidence,
            advice=f"completions are {evidence['generation_ratio']:.1f} times as long as prompts, and a prompt "
            f"weight was seen to matter for short completions only (R_g < 1);"
            " expect little of it",
            source="arXiv 2401.13586 section 4",
        )


STAGE = Stage(
    config=SftConfig,
    run=run,
    version=1,
    revised=lambda config: {"completion_count": 2} if config.normaliser == "completion_count" else {},
    trains=True,
    saves=True,
    makes=lambda config: ("policy",),
    reads=reads,
    rows=rows,
    demonstrates=lambda config: config.data == DEMONSTRATIONS,
    drops_overlap=lambda config: config.drop_overlap,
    weighs_tokens=True,
    batch=lambda config: Batch(config.rows_per_step, f"rows_per_step={config.rows_per_step}"),
    check=check,
    preflight=preflight,
)
