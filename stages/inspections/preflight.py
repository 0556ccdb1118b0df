"""What can be known about stages before an accelerator starts, with their tokenizer, template, problem and data, but without their weights.

the jobs of steps that are about to run -> findings. What cannot work is refused in one line (BadInput); what is probably not meant is a warning, with
what was measured. A policy that is not made yet has the tokenizer and template of the policy it comes from, which stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from stages.config import Config, FromList, identity
from stages.errors import BadInput
from stages.evaluate import EvaluateConfig
from stages.grpo import GrpoConfig
from stages.job import Finding, Job, Result, RowRange
from stages.rewards.compose import weights_of
from stages.sft import SftConfig, optimiser_steps, ratio, sequences
from stages.tokens.token_rows import TokenRow
from stages.tokens.weights import row_weights
from stages.training import TRL_CONFIGS, refuse_unknown_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.problems.base import Problem


class PreflightConfig(Config):
    """The steps to look at."""

    jobs: Annotated[tuple[Job, ...], FromList] = identity()
    """Their jobs; an sft job without problem and data has data that are not made yet."""
    policies_there: Annotated[tuple[str, ...], FromList] = identity(())
    """Stages whose policy is there; for the others an ancestor of it stands in, which may have had another Format."""


def run(job: Job) -> Result:
    """What was found. Raises BadInput for the first thing that cannot work."""
    config = PreflightConfig.model_validate(job.config)
    found = [finding for one in config.jobs for finding in look_at(one, one.name in config.policies_there)]
    return Result(outputs={}, metrics={"findings": len(found)}, findings=tuple(found))


def look_at(job: Job, policy_is_there: bool = True) -> list[Finding]:
    """Everything about one step; of an evaluation its rows."""
    from stages.inspections import format_rules
    from stages.policy import lora, models
    from stages.problems import catalog
    from stages.sampling import vllm_engine
    from stages.tokens import prefix

    if job.problem is not None:
        _problem(job, catalog.load(job.problem))
    if job.kind == "evaluate":
        return []
    assert job.format is not None, "the plan gives every stage a Format"
    path = models.local_path(job.inputs["policy"], weights=False)
    tokenizer = models.load_tokenizer(path, job.format)
    models.pick_device(job.execution)
    if job.sampler == "vllm":
        vllm_engine.refuse_what_it_cannot(job.execution.processes)
    if job.kind in TRL_CONFIGS:
        refuse_unknown_settings(job.name, job.kind, job.config["trl"])
    if job.lora is not None:
        lora.refuse_targets(path, job.lora)
        lora.quantization(job.lora)
    prefix.prefix_ids(tokenizer, job.format.response_prefix)
    if policy_is_there:
        format_rules.refuse_other_formats(job, path, tokenizer)
    own, general = _sft_rows(job, path, tokenizer) if job.kind == "sft" else ([], _mixed(job, tokenizer))
    rows = [*own, *general]
    dressed = format_rules.dressed(job, job.format, tokenizer, own)
    if general:
        dressed += format_rules.dressed(job, job.format, tokenizer, general)
    return [
        *format_rules.template(job, tokenizer),
        *format_rules.prefixes(job, tokenizer, dressed),
        *_weights(job, rows),
        *_positions(job, path, rows),
        *_warm_up(job, rows),
        *format_rules.boundaries(job, tokenizer, own, "rows"),
        *format_rules.boundaries(job, tokenizer, general, "rows of its mix"),
        *format_rules.system_prompts(job, tokenizer, own),
    ]


def _problem(job: Job, problem: Problem) -> None:
    """Raise BadInput for a reward component that the problem does not have, and for fewer rows than are asked for."""
    from stages.errors import TooFew
    from stages.problems import catalog

    if job.kind == "grpo":
        weights_of(job.name, GrpoConfig.model_validate(job.config).rewards, problem.reward_weights)
    for field, range in _asked(job).items():
        last = range.model_copy(update={"start": range.stop - 1})
        try:
            catalog.rows(problem, last)
        except TooFew as error:
            raise BadInput(f"{field}: {error}") from None


def _asked(job: Job) -> dict[str, RowRange]:
    """The recipe's field -> the rows it asks for."""
    if job.kind == "evaluate":
        return EvaluateConfig.model_validate(job.config).ranges
    return {f"stages.{job.name}.rows": job.rows} if job.rows else {}


def _sft_rows(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenRow], list[TokenRow]]:
    """Own and general rows that can be read; none where a stage that has not run makes the own ones, which is looked at again when it has."""
    from stages.data import sources
    from stages.policy import models

    models.refuse_vision(path)
    assert job.format is not None, "the plan gives every sft step a Format"
    config = SftConfig.model_validate(job.config)
    if job.problem is None and "data" not in job.inputs:
        if config.mix:
            sources.look_at_general(job, job.format, tokenizer)
        return [], []
    rows = sources.load(job, job.format, tokenizer, config.mix)
    sequences(config, rows.all)
    return rows.own, rows.general


def _mixed(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The general rows of a grpo stage that can be read."""
    from stages.data import sources

    if job.kind != "grpo" or not (config := GrpoConfig.model_validate(job.config)).mix:
        return []
    assert job.format is not None, "the plan gives every stage a Format"
    return sources.general_of_steps(job, job.format, tokenizer, config.general_rows, config.steps)


def _weights(job: Job, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Weights that leave something to learn, and mean what they say."""
    if not rows or job.kind != "sft":
        return
    config = SftConfig.model_validate(job.config)
    if not any(weight for row in rows for weight in row_weights(row, config.weights)):
        raise BadInput(
            f"{job.name}: no token of its {len(rows)} rows has a weight above 0, so nothing would be trained; look at loss_weights"
        )
    yield from generation_ratio(job.name, config, rows)


def _positions(job: Job, path: str, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Rows that the model has positions for."""
    from transformers import AutoConfig

    most = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "max_position_embeddings", None)
    longest = max((len(row.ids) for row in rows), default=0)
    if most and longest > most:
        yield Finding(
            rule="row_longer_than_positions",
            severity="warn",
            stage=job.name,
            evidence={"longest": longest, "positions": most},
            advice=f"a row has {longest} tokens, and the model has positions for {most}; rows are never cut, so shorten it or remove it",
        )


def _warm_up(job: Job, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Steps beyond the warm-up, whose first one has a learning rate of 0."""
    if job.kind not in TRL_CONFIGS or (job.kind == "sft" and not rows) or job.config.get("packing"):
        return
    config = SftConfig.model_validate(job.config) if job.kind == "sft" else GrpoConfig.model_validate(job.config)
    steps = config.steps if isinstance(config, GrpoConfig) else optimiser_steps(config, len(rows))
    warm_up = config.warmup_steps if config.warmup_steps >= 1 else math.ceil(steps * config.warmup_steps)
    if steps <= warm_up:
        yield Finding(
            rule="only_warm_up",
            severity="warn",
            stage=job.name,
            evidence={"steps": steps, "warmup_steps": warm_up},
            advice=f"{steps} optimiser steps do not go beyond the {warm_up:g} of the warm-up, whose first has a learning rate of 0; run more steps, or set warmup_steps to 0",
            override=f"stages.{job.name}.warmup_steps=0",
        )


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
            advice=f"prompt tokens carry {evidence['prompt_weight_share']:.0%} of the loss, so the stage mostly learns prompts; lower the prompt's weight",
            override=f"stages.{stage}.prompt_loss_weight={0.5 * config.prompt_loss_weight:g}" if by_number else None,
            source="arXiv 2401.13586",
        )
    if prompt_is_weighted and evidence["generation_ratio"] > 1:
        yield Finding(
            rule="generation_ratio",
            severity="warn",
            stage=stage,
            evidence=evidence,
            advice=f"completions are {evidence['generation_ratio']:.1f} times as long as prompts, and a prompt weight was seen to matter for short completions only (R_g < 1);"
            " expect little of it",
            source="arXiv 2401.13586 section 4",
        )
