"""What can be known about stages before an accelerator starts, with their tokenizer, template, problem and data, but without their weights.

the jobs of stages that are about to run -> findings. What cannot work is refused in one line (BadInput); what is probably not meant is a warning, with
what was measured. A policy that is not made yet has the tokenizer and template of the policy it comes from, which stands in for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from stages.config import Config, FromList, identity
from stages.job import MANIFEST, BadInput, Finding, Findings, Format, Job, Result, different
from stages.sft import SftConfig, ratio, sequences
from stages.tokens import ANSWERED, PREFIX, SYSTEM, TokenRow
from stages.training import TRL_CONFIGS, refuse_unknown_settings
from stages.weighting import row_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "findings.json"
SET_BY = {
    "system_prompt": {"prompt"},
    "user_template": {"prompt"},
    "response_prefix": {"response_prefix", "per_row"},
    "per_row": {"response_prefix", "per_row"},
    "chat_template": {"chat_template"},
}
"""Field of a Format -> what of a stage's `format` changes it."""
LOOKED_AT = 200
"""Rows of a problem that are rendered to try template and prefix on."""


class PreflightConfig(Config):
    """The stages to look at."""

    jobs: Annotated[tuple[Job, ...], FromList] = identity()
    """Their jobs; an sft job without problem and data has data that are not made yet."""
    policies_there: Annotated[tuple[str, ...], FromList] = identity(())
    """Stages whose policy is there; for the others an ancestor of it stands in, which may have had another Format."""


def run(job: Job) -> Result:
    """Write `findings.json`. Raises BadInput for the first thing that cannot work."""
    config = PreflightConfig.model_validate(job.config)
    found = [finding for one in config.jobs for finding in look_at(one, one.name in config.policies_there)]
    Path(job.out, FILE).write_text(Findings(findings=tuple(found)).model_dump_json(indent=1))
    return Result(outputs={"findings": FILE}, metrics={"findings": len(found)})


def look_at(job: Job, policy_is_there: bool = True) -> list[Finding]:
    """Everything about one stage."""
    from stages import lora, models, prefix

    assert job.format is not None, "the plan gives every stage a Format"
    path = models.local_path(job.inputs["policy"], weights=False)
    tokenizer = models.load_tokenizer(path, job.format)
    models.pick_device(job.execution)
    if job.kind in TRL_CONFIGS:
        refuse_unknown_settings(job.name, job.kind, job.config["trl"])
    if job.lora is not None:
        lora.refuse_targets(path, job.lora)
        lora.quantization(job.lora)
    prefix.prefix_ids(tokenizer, job.format.response_prefix)
    if policy_is_there:
        _serves_what_it_was_trained_with(job, path, tokenizer)
    rows = _sft_rows(job, path, tokenizer) if job.kind == "sft" else []
    dressed = _dressed(job, job.format, tokenizer, rows)
    return [
        *_template(job, tokenizer),
        *_prefixes(job, tokenizer, dressed),
        *_weights(job, rows),
        *_words(job, tokenizer, rows),
    ]


def _sft_rows(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """Data that can be read; none where a stage that has not run makes them, which is looked at again when it has."""
    from stages import data, models

    models.refuse_vision(path)
    if job.problem is None and "data" not in job.inputs:
        return []
    assert job.format is not None, "the plan gives every sft step a Format"
    rows = data.load(job, job.format, tokenizer)
    sequences(SftConfig.model_validate(job.config), rows)
    return rows


def _weights(job: Job, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Weights that leave something to learn, and mean what they say."""
    if not rows:
        return
    config = SftConfig.model_validate(job.config)
    if not any(weight for row in rows for weight in row_weights(row, config.weights)):
        raise BadInput(
            f"{job.name}: no token of its {len(rows)} rows has a weight above 0, so nothing would be trained; look at loss_weights"
        )
    yield from generation_ratio(job.name, config, rows)


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


def _words(job: Job, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Rows that are dressed otherwise than the Format says, or whose answers the tokenizer would have begun otherwise."""
    from stages import prefix

    assert job.format is not None, "the plan gives every stage a Format"
    looked_at = rows[:LOOKED_AT]
    if rate := _share(prefix.merges_at_boundary(tokenizer, row) for row in looked_at):
        yield Finding(
            rule="prefix_boundary",
            severity="warn",
            stage=job.name,
            evidence={"rate": rate, "rows": len(looked_at)},
            advice=f"in {rate:.0%} of {len(looked_at)} rows the tokenizer would merge across the start or end of the response prefix, which is never done in training or serving;"
            " end the prefix where a token ends",
        )
    if rate := _share(_said(tokenizer, row, SYSTEM) != job.format.system_prompt.strip() for row in looked_at):
        yield Finding(
            rule="other_system_prompt",
            severity="warn",
            stage=job.name,
            evidence={"rate": rate, "rows": len(looked_at)},
            advice=f"{rate:.0%} of {len(looked_at)} rows have another system prompt than the Format's, with which the policy is evaluated and trained further",
        )


def _share(flags: Iterable[bool]) -> float:
    seen = list(flags)
    return sum(seen) / len(seen) if seen else 0.0


def _said(tokenizer: PreTrainedTokenizerBase, row: TokenRow, role: str) -> str:
    """The words of one role, blank space around them left out, up to the first answer."""
    first = min((row.roles.find(letter) for letter in ANSWERED if letter in row.roles), default=len(row.roles))
    ids = [id for id, letter in zip(row.ids[:first], row.roles, strict=False) if letter == role]
    return str(tokenizer.decode(ids)).strip() if ids else ""


def _dressed(
    job: Job, format: Format, tokenizer: PreTrainedTokenizerBase, sft_rows: Sequence[TokenRow]
) -> list[tuple[str, str]]:
    """(prompt as text, its prefix) of some of the stage's rows, and of a question that is none. Raises BadInput for rows and a template that do not
    go together."""
    from stages import chat, prefix, problems

    system = [{"role": "system", "content": format.system_prompt}] if format.system_prompt else []
    question = "".join(piece for _, piece in chat.pieces(tokenizer, [*system, {"role": "user", "content": "?"}]))
    found = [] if format.per_row else [(question, format.response_prefix)]
    for row in sft_rows[:LOOKED_AT]:
        first = min(row.roles.index(letter) for letter in ANSWERED if letter in row.roles)
        start = row.ids[first : first + len(row.roles[first:]) - len(row.roles[first:].lstrip(PREFIX))]
        found.append((str(tokenizer.decode(row.ids[:first])), str(tokenizer.decode(start)) if start else ""))
    if job.problem is not None and job.rows is not None and not sft_rows:
        range = job.rows.model_copy(update={"stop": min(job.rows.stop, job.rows.start + LOOKED_AT)})
        for row in problems.rows(problems.load(job.problem), range):
            text = "".join(piece for _, piece in chat.pieces(tokenizer, prefix.messages(format, row)))
            found.append((text, prefix.of_row(format, row)))
    return found


def _template(job: Job, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """A template that says the same every day."""
    from stages import chat

    if "strftime_now" in chat.training_template(tokenizer):
        yield Finding(
            rule="template_has_a_date",
            severity="warn",
            stage=job.name,
            evidence={},
            advice="the chat template writes today's date into prompts, so stages that run on different days have different prompts; set format.chat_template to one without it",
        )


def _prefixes(job: Job, tokenizer: PreTrainedTokenizerBase, dressed: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Prefixes that can be written down, that the template does not already hold, and that serving writes with the same ids."""
    first_prompt = {start: prompt for prompt, start in reversed(dressed)}
    for start, prompt in first_prompt.items():
        _written_once(job, tokenizer, prompt, start)
        if start.endswith(" "):
            yield Finding(
                rule="prefix_ends_in_space",
                severity="warn",
                stage=job.name,
                evidence={},
                advice=f"the response prefix {start!r} ends in a space, which most tokenizers write as the start of the next word; remove the space",
            )
        if _merges(tokenizer, prompt, start):
            yield Finding(
                rule="prefix_merges_with_prompt",
                severity="warn",
                stage=job.name,
                evidence={},
                advice=f"the tokenizer merges the response prefix {start!r} with the end of the prompt where it tokenises both as one text, as servers do; begin it where a token begins",
            )


def _written_once(job: Job, tokenizer: PreTrainedTokenizerBase, prompt: str, start: str) -> None:
    """Raise BadInput for a prefix that does not come back, that is open already, or that stands otherwise in a text than alone."""
    from stages import prefix

    ids = [*prefix.encode(tokenizer, prompt), *prefix.prefix_ids(tokenizer, start), *prefix.encode(tokenizer, "x")]
    if opened(prompt, start):
        raise BadInput(
            f"{job.name}: the chat template already ends its generation prompt in {prompt[-30:]!r}, and the response prefix {start!r} would open it again;"
            " set format.response_prefix to what comes after it, or to ''"
        )
    if tokenizer.decode(ids) != tokenizer.decode(prefix.encode(tokenizer, f"{prompt}{start}x")):
        raise BadInput(
            f"{job.name}: the tokenizer writes a text that stands alone otherwise than inside another (it puts a blank before it), so what is trained after"
            f" {start!r} is not what is served; use a tokenizer without a prefix space"
        )


def _merges(tokenizer: PreTrainedTokenizerBase, prompt: str, start: str) -> bool:
    """Whether prompt + prefix as one text has other ids than one after the other."""
    from stages import prefix

    return prefix.encode(tokenizer, prompt + start) != [
        *prefix.encode(tokenizer, prompt),
        *prefix.prefix_ids(tokenizer, start),
    ]


def opened(prompt: str, start: str) -> bool:
    """Whether a generation prompt already ends with the prefix, or with the tag that the prefix opens with; blank space does not count."""
    tag = re.match(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])", start)
    openings = [opening for opening in (start.strip(), tag[1] if tag else "") if opening]
    return any(prompt.rstrip().endswith(opening) for opening in openings)


def _serves_what_it_was_trained_with(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A policy of ours shows what it was trained with, in its manifest, or at the end of its serving template where that was lost on the way: raise
    BadInput when the job has another Format and does not say so."""
    from stages import chat, prefix

    assert job.format is not None, "the plan gives every stage a Format"
    on_purpose = {name for name, value in (job.config.get("format") or {}).items() if value is not None}
    templates, manifest = tokenizer.chat_template, Path(path, MANIFEST)
    if manifest.is_file() and (found := json.loads(manifest.read_text()).get("format")):
        for name in different(Format.model_validate(found), job.format):
            if not SET_BY[name] & on_purpose:
                raise BadInput(
                    f"{job.name}: its policy was trained with another {name}; change it on purpose with stages.{job.name}.format"
                )
        return
    ours = isinstance(templates, dict) and chat.TRAINING in templates and not SET_BY["response_prefix"] & on_purpose
    if ours and templates["default"] != prefix.serving_template(templates[chat.TRAINING], job.format):
        raise BadInput(
            f"{job.name}: its policy was trained with another response prefix than {job.format.response_prefix!r}; its chat template ends in"
            f" {templates['default'][-40:]!r}. Set format.response_prefix to that, or change it on purpose with stages.{job.name}.format"
        )
