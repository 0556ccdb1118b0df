"""What the tokens of rows show before any weight is loaded: what the template made of answers, control tokens that a
message holds, and ids that the model has no embedding for.

token rows + tokenizer -> findings with the rate of rows they are true of. Ids beyond the embedding are refused
(BadInput): training would end at its first step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from stages.errors import BadInput
from stages.job import Finding, Job
from stages.tokens.conversation import ADDED, BLANKS, STARTS_WITH_OPENED
from stages.tokens.token_rows import ANSWERED, COMPLETION, SYSTEM, USER, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVICE = {
    STARTS_WITH_OPENED: "an answer starts with what the chat template has opened; that stands in the prompt, and is "
    "trained once",
    BLANKS: "the chat template writes the blanks of an answer otherwise than its message; they are trained as the "
    "template writes them",
    ADDED: "the chat template puts something before an answer, such as an empty block of reasoning, and it is trained "
    "with the answer, so rewards will see it; look at a row with inspect",
}
"""Note of a row -> what it means."""


def as_the_template_writes(job: Job, rows: Sequence[TokenRow], what: str) -> Iterator[Finding]:
    """Answers that the template writes otherwise than their message; `what` the rows are, in the plural."""
    for note, advice in ADVICE.items():
        count = sum(note in row.notes for row in rows)
        yield from _rate(job, f"answer_{note}", count, len(rows), f"in {{rate:.0%}} of {len(rows)} {what} {advice}")


def control_tokens(
    job: Job, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow], declared: Collection[int], what: str
) -> Iterator[Finding]:
    """Tokens in messages that mean something to the model: a second end in an answer, and the template's own tokens in
    the words of others. `declared` are the ends of the model's generation settings."""
    ends = {*_named(tokenizer, "bos_token_id", "eos_token_id", "pad_token_id"), *declared}
    control = ends | _of_the_template(tokenizer)
    second = sum(any(ends & {*_before_its_end(one, ends)} for one in _answers(row)) for row in rows)
    yield from _rate(
        job,
        "second_end",
        second,
        len(rows),
        f"in {{rate:.0%}} of {len(rows)} {what} an answer holds a token that ends a text, before the end that is added "
        f"to it; remove it from the data, or the policy learns to end twice",
    )
    words = sum(bool(control & _ids_in_words(row)) for row in rows)
    yield from _rate(
        job,
        "control_tokens_in_words",
        words,
        len(rows),
        f"in {{rate:.0%}} of {len(rows)} {what} the words of a message hold control tokens of the chat template, so it "
        f"reads as several turns; remove them from the data",
    )


def _rate(job: Job, rule: str, count: int, rows: int, advice: str) -> Iterator[Finding]:
    """A warning, where there is something to warn of."""
    if count:
        rate = count / rows
        evidence = {"rate": rate, "rows": float(rows)}
        yield Finding(rule=rule, severity="warn", stage=job.name, evidence=evidence, advice=advice.format(rate=rate))


def _answers(row: TokenRow) -> list[list[int]]:
    """The ids of each answer, turn end included."""
    if COMPLETION not in row.roles:
        return []
    runs = groupby(zip(row.ids, row.roles, strict=True), key=lambda pair: pair[1] in ANSWERED)
    return [[id for id, _ in run] for answered, run in runs if answered]


def _named(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[int]:
    """The ids of those that the tokenizer has."""
    return [id for name in names if isinstance(id := getattr(tokenizer, name), int)]


def _before_its_end(answer: list[int], ends: Collection[int]) -> list[int]:
    """An answer without the end of its turn; one that was cut has none."""
    return answer[:-1] if answer[-1] in ends else answer


def _ids_in_words(row: TokenRow) -> set[int]:
    """The ids of what system and user say."""
    return {id for id, role in zip(row.ids, row.roles, strict=True) if role in (SYSTEM, USER)}


def _of_the_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Control tokens that the template writes around a question."""
    from stages.tokens import chat, prefix
    from stages.tokens.turns import QUESTION

    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special & {*prefix.encode(tokenizer, chat.render(tokenizer, [QUESTION]))}


def refuse_beyond_embedding(job: Job, tokenizer: PreTrainedTokenizerBase, path: str, rows: Sequence[TokenRow]) -> None:
    """Raise BadInput for a token that a row or padding has and the model's embedding has not: tokens were added to the
    tokenizer and the model was not resized."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    size = getattr(config, "vocab_size", None)
    named = _named(tokenizer, "pad_token_id", "eos_token_id")
    highest = max([*named, *(max(row.ids, default=0) for row in rows)], default=0)
    if size and highest >= size:
        raise BadInput(
            f"{job.name}: the token {tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, but the model's "
            f"embedding has {size} rows; resize it (model.resize_token_embeddings(len(tokenizer))) and save the model"
        )
