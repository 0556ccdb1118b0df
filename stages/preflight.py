"""What can be known about stages before an accelerator starts, with their tokenizer, template, problem and data, but without their weights.

the jobs of stages that are about to run -> findings. What cannot work is refused in one line (BadInput); what is probably not meant is a warning, with
what was measured. A policy that is not made yet has the tokenizer and template of the policy it comes from, which stands in for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from stages.config import Config, FromList, identity
from stages.job import BadInput, Finding, Findings, Format, Job, Result
from stages.sft import SftConfig, ratio, sequences
from stages.training import TRL_CONFIGS, refuse_unknown_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.tokens import TokenRow

FILE = "findings.json"
LOOKED_AT = 200
"""Rows of a problem that are rendered to try template and prefix on."""


class PreflightConfig(Config):
    """The stages to look at."""

    jobs: Annotated[tuple[Job, ...], FromList] = identity()
    """Their jobs; an sft job without problem and data has data that are not made yet."""


def run(job: Job) -> Result:
    """Write `findings.json`. Raises BadInput for the first thing that cannot work."""
    found = [finding for one in PreflightConfig.model_validate(job.config).jobs for finding in look_at(one)]
    Path(job.out, FILE).write_text(Findings(findings=tuple(found)).model_dump_json(indent=1))
    return Result(outputs={"findings": FILE}, metrics={"findings": len(found)})


def look_at(job: Job) -> list[Finding]:
    """Everything about one stage."""
    from stages import lora, models

    assert job.format is not None, "the plan gives every stage a Format"
    path = models.local_path(job.inputs["policy"], weights=False)
    tokenizer = models.load_tokenizer(path, job.format)
    models.pick_device(job.execution)
    if job.lora is not None and job.lora.quantize:
        lora.refuse_quantization()
    _serves_what_it_was_trained_with(job, tokenizer)
    prompts, starts = _dressed(job, job.format, tokenizer)
    found = [finding for start in dict.fromkeys(starts) for finding in _prefix(job, tokenizer, start, prompts)]
    if job.kind in TRL_CONFIGS:
        refuse_unknown_settings(job.name, job.kind, job.config["trl"])
    return [*found, *(_sft(job, path, tokenizer) if job.kind == "sft" else ())]


def _sft(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Data that can be read, and whose weights mean what they say."""
    from stages import data, models

    config = SftConfig.model_validate(job.config)
    assert job.format is not None, "the plan gives every sft step a Format"
    models.refuse_vision(path)
    if job.problem is None and "data" not in job.inputs:
        return  # made by a stage that has not run; looked at again when it has
    rows = data.load(job, job.format, tokenizer)
    sequences(config, rows)
    yield from generation_ratio(job.name, config, rows)
    yield from _boundary(job, rows, tokenizer)


def generation_ratio(stage: str, config: SftConfig, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Prompt weights that carry most of the loss, or that hardly can matter."""
    evidence = ratio(rows, config.weights)
    prompt_is_weighted = evidence["prompt_weight_share"] > 0
    if evidence["prompt_weight_share"] > 0.5:
        yield Finding(
            rule="prompt_weight_share",
            severity="warn",
            stage=stage,
            evidence=evidence,
            advice=f"prompt tokens carry {evidence['prompt_weight_share']:.0%} of the loss, so the stage mostly learns prompts; lower the prompt's weight",
            override=f"stages.{stage}.prompt_loss_weight={0.5 * config.prompt_loss_weight:g}",
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


def _boundary(job: Job, rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Rows whose own tokenisation would have merged across an end of the prefix, where training and serving never do."""
    from stages import prefix

    looked_at = [row for row in rows[:LOOKED_AT] if "p" in row.roles or "c" in row.roles]
    rate = sum(prefix.merges_at_boundary(tokenizer, row) for row in looked_at) / len(looked_at)
    if rate:
        yield Finding(
            rule="prefix_boundary",
            severity="warn",
            stage=job.name,
            evidence={"rate": rate, "rows": len(looked_at)},
            advice=f"in {rate:.0%} of {len(looked_at)} rows the tokenizer would merge across the start or end of the response prefix, which is never done in training or serving;"
            " end the prefix where a token ends",
        )


def _dressed(job: Job, format: Format, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """(prompts as text, their prefixes) of some of the stage's rows. Raises BadInput for rows or a template that do not go together."""
    from stages import chat, prefix, problems

    if job.problem is None or job.rows is None:
        return [], [] if format.per_row else [format.response_prefix]
    range = job.rows.model_copy(update={"stop": min(job.rows.stop, job.rows.start + LOOKED_AT)})
    rows = problems.rows(problems.load(job.problem), range)
    texts = ["".join(piece for _, piece in chat.pieces(tokenizer, prefix.messages(format, row))) for row in rows]
    return texts, [prefix.of_row(format, row) for row in rows]


def _prefix(job: Job, tokenizer: PreTrainedTokenizerBase, start: str, prompts: Sequence[str]) -> Iterator[Finding]:
    """A prefix that can be written down, and that the template does not already hold."""
    from stages import prefix

    prefix.prefix_ids(tokenizer, start)
    for text in prompts[:1]:
        if opened(text, start):
            raise BadInput(
                f"{job.name}: the chat template already ends its generation prompt in {text[-30:]!r}, and the response prefix {start!r} would open it again;"
                " set format.response_prefix to what comes after it, or to ''"
            )
    if start.endswith(" "):
        yield Finding(
            rule="prefix_ends_in_space",
            severity="warn",
            stage=job.name,
            evidence={},
            advice=f"the response prefix {start!r} ends in a space, which most tokenizers write as the start of the next word; remove the space",
        )


def opened(prompt: str, start: str) -> bool:
    """Whether a generation prompt already ends with the prefix, or with the tag that the prefix opens with; blank space does not count."""
    tag = re.match(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])", start)
    openings = [opening for opening in (start.strip(), tag[1] if tag else "") if opening]
    return any(prompt.rstrip().endswith(opening) for opening in openings)


def _serves_what_it_was_trained_with(job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
    """A policy of ours that came without its manifest still shows its prefix: raise BadInput when the job has another and does not say so."""
    from stages import chat, prefix

    assert job.format is not None, "the plan gives every stage a Format"
    templates = tokenizer.chat_template
    if not isinstance(templates, dict) or chat.TRAINING not in templates or job.config.get("format"):
        return
    if templates["default"] != prefix.serving_template(templates[chat.TRAINING], job.format):
        raise BadInput(
            f"{job.name}: its policy was trained with another response prefix than {job.format.response_prefix!r}; its chat template ends in"
            f" {templates['default'][-40:]!r}. Set format.response_prefix to that, or change it on purpose with stages.{job.name}.format"
        )
