"""The Format contract, as far as a tokenizer and a template show it without weights: text that training and
serving would render differently is refused (BadInput), what probably is not meant is a Finding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import BadInput
from stages.job import MANIFEST, Finding, Format, Job, different
from stages.tokens.token_rows import SYSTEM, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def prompts_with_prefix(
    job: Job, format: Format, tokenizer: PreTrainedTokenizerBase, sft_rows: Sequence[TokenRow]
) -> list[tuple[str, str]]:
    """(prompt as text, its prefix) of some of the stage's rows, and of a question that is none. Raises BadInput for
    rows and a template that do not go together."""
    from stages.problems import catalog
    from stages.tokens import chat, prefix

    system = [{"role": "system", "content": format.system_prompt}] if format.system_prompt else []
    question = "".join(piece for _, piece in chat.pieces(tokenizer, [*system, {"role": "user", "content": "?"}]))
    found = [] if format.per_row else [(question, format.response_prefix)]
    for row in sft_rows[:LOOKED_AT]:
        first, end = row.edges
        start = str(tokenizer.decode(row.ids[first:end])) if end > first else ""
        found.append((str(tokenizer.decode(row.ids[:first])), start))
    if job.problem is not None and job.rows is not None and not sft_rows:
        range = job.rows.model_copy(update={"stop": min(job.rows.stop, job.rows.start + LOOKED_AT)})
        problem = catalog.load(job.problem, job.copies)
        conversations = [(prefix.messages(format, row), row) for row in catalog.rows(problem, range)]
        if len(conversations) > 1 and all(turns == conversations[0][0] for turns, _ in conversations):
            raise BadInput(
                f"{job.name}: the prompt {format.prompt} says the same for every row; let its user template hold "
                f"{{{{ prompt }}}}"
            )
        for turns, row in conversations:
            text = "".join(piece for _, piece in chat.pieces(tokenizer, turns))
            found.append((text, prefix.of_row(format, row)))
    return found


def template(job: Job, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """A template that says the same every day."""
    from stages.tokens import chat

    if "strftime_now" in chat.training_template(tokenizer):
        yield Finding(
            rule="template_has_a_date",
            severity="warn",
            stage=job.name,
            evidence={},
            advice="the chat template writes today's date into prompts, so stages that run on different days have "
            "different prompts; set format.chat_template to one without it",
        )


def prefixes(job: Job, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Prefixes that can be written down, that the template does not already hold, and that serving writes with the
    same ids."""
    first_prompt = {start: prompt for prompt, start in reversed(prompts)}
    for start, prompt in first_prompt.items():
        _written_once(job, tokenizer, prompt, start)
        if start.endswith(" "):
            yield Finding(
                rule="prefix_ends_in_space",
                severity="warn",
                stage=job.name,
                evidence={},
                advice=f"the response prefix {start!r} ends in a space, which most tokenizers write as the start of "
                f"the next word; remove the space",
            )
        if _merges(tokenizer, prompt, start):
            yield Finding(
                rule="prefix_merges_with_prompt",
                severity="warn",
                stage=job.name,
                evidence={},
                advice=f"the tokenizer merges the response prefix {start!r} with the end of the prompt where it "
                f"tokenises both as one text, as servers do; begin it where a token begins",
            )


def _written_once(job: Job, tokenizer: PreTrainedTokenizerBase, prompt: str, start: str) -> None:
    """Raise BadInput for a prefix that does not come back, that is open already, or that stands otherwise in a text
    than alone."""
    from stages.tokens import prefix

    ids = [*prefix.encode(tokenizer, prompt), *prefix.prefix_ids(tokenizer, start), *prefix.encode(tokenizer, "x")]
    if opened(prompt, start):
        raise BadInput(
            f"{job.name}: the chat template already ends its generation prompt in {prompt[-30:]!r}, and the response "
            f"prefix {start!r} would open it again; set format.response_prefix to what comes after it, or to ''"
        )
    if tokenizer.decode(ids) != tokenizer.decode(prefix.encode(tokenizer, f"{prompt}{start}x")):
        raise BadInput(
            f"{job.name}: the tokenizer writes a text that stands alone otherwise than inside another (it puts a "
            f"blank before it), so what is trained after {start!r} is not what is served; use a tokenizer without a "
            f"prefix space"
        )


def _merges(tokenizer: PreTrainedTokenizerBase, prompt: str, start: str) -> bool:
    """Whether prompt + prefix as one text has other ids than one after the other."""
    from stages.tokens import prefix

    return prefix.encode(tokenizer, prompt + start) != [
        *prefix.encode(tokenizer, prompt),
        *prefix.prefix_ids(tokenizer, start),
    ]


def opened(prompt: str, start: str) -> bool:
    """Whether a generation prompt already ends with the prefix, or with the tag that the prefix opens with; blank
    space does not count."""
    tag = re.match(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])", start)
    openings = [opening for opening in (start.strip(), tag[1] if tag else "") if opening]
    return any(prompt.rstrip().endswith(opening) for opening in openings)


def refuse_other_formats(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A policy of ours shows what it was trained with, in its manifest, or at the end of its serving template where
    that was lost on the way: raise BadInput when the job has another Format and does not say so."""
    from stages.tokens import chat, prefix

    assert job.format is not None, "the plan gives every stage a Format"
    on_purpose = {name for name, value in (job.config.get("format") or {}).items() if value is not None}
    templates, manifest = tokenizer.chat_template, Path(path, MANIFEST)
    trained_with = json.loads(manifest.read_text(encoding="utf-8")).get("format") if manifest.is_file() else None
    if trained_with:
        for name in different(Format.model_validate(trained_with), job.format):
            if not SET_BY[name] & on_purpose:
                raise BadInput(
                    f"{job.name}: its policy was trained with another {name}; change it on purpose with "
                    f"stages.{job.name}.format"
                )
        return
    ours = isinstance(templates, dict) and chat.TRAINING in templates and not SET_BY["response_prefix"] & on_purpose
    if ours and templates["default"] != prefix.serving_template(templates[chat.TRAINING], job.format):
        raise BadInput(
            f"{job.name}: its policy was trained with another response prefix than {job.format.response_prefix!r}; "
            f"its chat template ends in {templates['default'][-40:]!r}. Set format.response_prefix to that, or change "
            f"it on purpose with stages.{job.name}.format"
        )


def boundaries(job: Job, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow], what: str) -> Iterator[Finding]:
    """Rows whose answers the tokenizer would have begun otherwise; `what` they are, in the plural."""
    from stages.tokens import prefix

    looked_at = rows[:LOOKED_AT]
    if rate := _share(prefix.merges_at_boundary(tokenizer, row) for row in looked_at):
        yield Finding(
            rule="prefix_boundary",
            severity="warn",
            stage=job.name,
            evidence={"rate": rate, "rows": len(looked_at)},
            advice=f"in {rate:.0%} of {len(looked_at)} {what} the tokenizer would merge across the start or end of "
            f"the response prefix, which is never done in training or serving;"
            " end the prefix where a token ends",
        )


def system_prompts(job: Job, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Rows whose system prompt is not the Format's."""
    assert job.format is not None, "the plan gives every stage a Format"
    looked_at = rows[:LOOKED_AT]
    if rate := _share(_said(tokenizer, row, SYSTEM) != job.format.system_prompt.strip() for row in looked_at):
        yield Finding(
            rule="other_system_prompt",
            severity="warn",
            stage=job.name,
            evidence={"rate": rate, "rows": len(looked_at)},
            advice=f"{rate:.0%} of {len(looked_at)} rows have another system prompt than the Format's, with which "
            f"the policy is evaluated and trained further",
        )


def _share(flags: Iterable[bool]) -> float:
    seen = list(flags)
    return sum(seen) / len(seen) if seen else 0.0


def _said(tokenizer: PreTrainedTokenizerBase, row: TokenRow, role: str) -> str:
    """The words of one role, blank space around them left out, up to the first answer."""
    ids = [id for id, letter in zip(row.ids[: row.edges[0]], row.roles, strict=False) if letter == role]
    return str(tokenizer.decode(ids)).strip() if ids else ""
