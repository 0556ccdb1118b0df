"""From a trainer to the directory of a policy that `from_pretrained` loads: tried before training, written after.

A published policy carries two chat templates: the serving template, which yields the response prefix, and the training
template next to it (see `stages.tokens.prefix`). It has the precision of `model.dtype`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from stages.errors import BadInput
from stages.job import Finding, Format, Job
from stages.policy import as_trained, lora
from stages.policy.models import load_policy, local_path
from stages.runtime import ranks
from stages.tokens import chat, prefix

TRIAL = "trial"
"""Directory in a job's work in which its policy is written once without weights."""
KEPT = 0.9
"""Share of an adapter's update that has to survive the merge; below it there is a warning."""
QUANTIZED = 0.01
"""Nats a token between a policy that was trained in 4 bits and the published one; above it there is a warning."""


def refuse_unsaveable(trainer: Any, tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
    """Write once, and throw away, all files of a policy but its weights: config, generation settings, tokenizer.
    Raises BadInput where that cannot be written, before anything is trained."""
    assert job.format is not None, "the plan gives every stage that trains a Format"
    if not ranks.first():
        return
    model, place = trainer.accelerator.unwrap_model(trainer.model), Path(job.work, TRIAL)
    settings = deepcopy(model.generation_config)
    settings.eos_token_id = tokenizer.eos_token_id  # a trainer aligns it, and changed settings are judged strictly
    try:
        settings.save_pretrained(place)
        model.config.save_pretrained(place)
        _save_tokenizer(deepcopy(tokenizer), job.format, place)
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(
            f"{job.name}: its policy could not be saved after training ({' '.join(str(error).split())[:200]}); correct "
            f"the files of {job.sources.get('policy', 'its policy')}"
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def publish(
    trainer: Any, tokenizer: PreTrainedTokenizerBase, job: Job, rows: Callable[[], Sequence[Sequence[int]]]
) -> tuple[Finding, ...]:
    """Write what a trainer has made to `job.out`, whole: an adapter is merged into the policy it was trained on, and
    kept next to it. `rows` gives ids of what it was trained on, by which 4 bits are compared with full precision.

    All processes call it; the first one writes. Weights that are spread over processes (FSDP, DeepSpeed) are gathered
    first. Raises RuntimeError where what was written has another precision than `model.dtype`.
    """
    assert job.format is not None, "the plan gives every stage that trains a Format"
    spread = trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if spread else None
    if not ranks.first():
        return ()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped if spread else trainer.model)
    if job.lora is None:
        _cache_as_before(model, local_path(job.inputs["policy"], weights=False))
        state = as_trained.without_copies(model, state) if state else None
        save_policy(model, tokenizer, job.format, Path(job.out), state)
        as_trained.refuse_other_precision(Path(job.out), model, job.dtype)
        return tuple(_unmoved(job))
    lora.save_adapter(model, Path(job.out, lora.ADAPTER), state, job.inputs["policy"])
    whole, kept = lora.merged(load_policy(local_path(job.inputs["policy"]), job.dtype), Path(job.out, lora.ADAPTER))
    _end_turns_alike(model, whole)
    save_policy(whole, tokenizer, job.format, Path(job.out))
    as_trained.refuse_other_precision(Path(job.out), whole, job.dtype)
    return (*_lost_in_the_merge(job, kept), *_lost_with_the_bits(job, model, whole, rows), *_unmoved(job))


def _unmoved(job: Job) -> Iterator[Finding]:
    """A policy whose every weight is what it was before the stage."""
    if _same_weights(Path(local_path(job.inputs["policy"])), Path(job.out)):
        yield Finding(
            rule="policy_did_not_move",
            severity="warn",
            stage=job.name,
            evidence={},
            advice="every weight is what it was before the stage, so it trained nothing; look at learning_rate, "
            "warmup_steps and rewards",
        )


def _same_weights(before: Path, after: Path) -> bool:
    """Whether two policies have equal tensors under the names that both have; False where there are none to
    compare. It ends at the first that differs."""
    ours, theirs = _tensors(after), _tensors(before)
    both = [name for name in ours if name in theirs]
    return bool(both) and all(_equal(ours[name], theirs[name], name) for name in both)


def _tensors(directory: Path) -> dict[str, Path]:
    """Tensor -> the safetensors file of the policy that holds it."""
    found: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _equal(ours: Path, theirs: Path, name: str) -> bool:
    with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        mine, before = one.get_tensor(name), other.get_tensor(name)
    return mine.shape == before.shape and torch.equal(mine, before.to(mine.dtype))


def _cache_as_before(model: Any, path: str) -> None:
    """A trainer turns the model's cache off while it trains; what is published is used to generate."""
    before = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if hasattr(before, "use_cache"):
        model.config.use_cache = before.use_cache


def _end_turns_alike(trained: Any, whole: Any) -> None:
    """A trainer aligns the model's special tokens with the tokenizer's; the policy that was loaded again has its old
    ones."""
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(whole.config, name, getattr(trained.config, name))
        setattr(whole.generation_config, name, getattr(trained.generation_config, name))


def _lost_in_the_merge(job: Job, kept: float) -> Iterator[Finding]:
    if kept < KEPT:
        yield Finding(
            rule="merge_rounding",
            severity="warn",
            stage=job.name,
            evidence={"kept": kept},
            advice=(
                f"{job.dtype} could hold only {kept:.0%} of what the adapter has learnt when it was merged into the "
                "policy; train in float32, or with a higher learning rate"
            ),
            override="model.dtype=float32",
        )


def _lost_with_the_bits(
    job: Job, trained: Any, whole: Any, rows: Callable[[], Sequence[Sequence[int]]]
) -> Iterator[Finding]:
    """How far the published policy is from the one that was trained on 4-bit weights."""
    if job.lora is None or job.lora.quantize is None:
        return
    kl = as_trained.divergence(trained, whole, rows())
    far = kl > QUANTIZED
    yield Finding(
        rule="quantized_merge",
        severity="warn" if far else "note",
        stage=job.name,
        evidence={"kl": kl},
        advice=(
            f"the adapter was trained on {job.lora.quantize} weights and is published on full ones; the two policies "
            f"differ by {kl:.3g} nats a token{'; train without quantize if its evaluation is worse' if far else ''}"
        ),
        override="model.lora.quantize=null" if far else None,
    )


def save_policy(
    model: Any, tokenizer: PreTrainedTokenizerBase, format: Format, out: Path, state: dict[str, Any] | None = None
) -> None:
    """Write a self-contained policy, a PreTrainedModel, whose serving template yields the Format's prefix. Other named
    templates of its tokenizer are left out: they would not yield it."""
    model.save_pretrained(out, state_dict=state)
    _save_tokenizer(tokenizer, format, out)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, format: Format, out: Path) -> None:
    """Write a tokenizer with its training template, and the serving template that follows from it."""
    training = chat.training_template(tokenizer)
    tokenizer.chat_template = {"default": prefix.serving_template(training, format), chat.TRAINING: training}
    tokenizer.save_pretrained(out)
