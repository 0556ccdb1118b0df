"""The response prefix: the only module that knows where it is added, and what a policy is served with.

A row becomes messages, messages become prompt ids by the *training template* (`stages.tokens.chat`), and a completion
is prefix + what was sampled:

    prompt ids | prefix ids | sampled ids, turn end

The prefix is tokenised on its own and never together with what stands before or after it, so the boundary is the same
in SFT, RL, rejection sampling and evaluation. SFT trains prefix + sampled as the completion; sampling gives the model
prompt + prefix; rewards, saved rollouts and scores see prefix + sampled as text. Serving needs none of this: the
*serving template* ends its generation prompt with the prefix.

Where the template's own generation prompt opens a tag such as <think>, that tag is prompt too, and the start of what
rewards and scores see; a prefix comes after it.

A Format has one prefix, or says which column gives each row its own (`per_row`); the serving template then adds none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from prompts import templates
from stages.errors import BadInput
from stages.job import Format
from stages.problems.base import Row
from stages.tokens import chat, limits
from stages.tokens.token_rows import COMPLETION, PREFIX, TokenRow
from stages.tokens.turns import Message, closing_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Columns = Row | Mapping[str, Any]
"""A row of a problem, or of a file."""
Rendered = tuple[list[int], str]
"""Ids, and a role letter for each."""


def serving_template(training: str, format: Format) -> str:
    """The training template, with the Format's prefix at the end of its generation prompt."""
    if not format.response_prefix:
        return training
    # jinja2 drops one newline at the end of a template, but not one before more text
    ending = training.removesuffix("\n")
    literal = json.dumps(format.response_prefix, ensure_ascii=False)
    # an expression, since a block would trim the blanks around it
    return f"{ending}{{{{ {literal} if add_generation_prompt else '' }}}}"


def seen_format(format: Format, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The Format with the digest of the template that is really used."""
    digest = hashlib.sha256(chat.training_template(tokenizer).encode()).hexdigest()
    return format.model_copy(update={"training_template": digest})


def format_digest(format: Format) -> str:
    """SHA-256 of the settings that format text; the prompt's name is not one of them."""
    return hashlib.sha256(format.model_dump_json(exclude={"prompt", "chat_template"}).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids: vocabulary, merges, normalisation; how it pads and cuts is left out."""
    if not tokenizer.is_fast:
        return _digest(tokenizer.get_vocab())
    content = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    return _digest({name: part for name, part in content.items() if name not in ("padding", "truncation")})


def card(tokenizer: PreTrainedTokenizerBase, format: Format) -> dict[str, Any]:
    """The tokenizer and the Format that made rows; a stage that trains on the rows compares them with its own."""
    return {"tokenizer": tokenizer_digest(tokenizer), "format": format.model_dump(mode="json")}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def messages(format: Format, row: Columns) -> list[Message]:
    """The conversation up to the policy's turn. Raises BadInput when the user template does not work on the row."""
    columns = _columns(row)
    what = f"the user template of prompt {format.prompt}"

    def render() -> str:
        return templates.compiled(format.user_template).render(columns)

    try:
        limits.refuse_endless(what, format.user_template, render)
        user = limits.rendered(what, render)
    except TemplateError as error:
        raise BadInput(f"prompt {format.prompt}: {error}; a row has {', '.join(columns)}") from None
    if found := templates.address(user, format.user_template, dict(columns)):
        raise BadInput(
            f"{what} writes the address of an object ({found!r}), and {templates.ADVICE}. Fix: leave it out; a "
            f"hexadecimal number has to stand in a column of the row"
        )
    system = [{"role": "system", "content": format.system_prompt}] if format.system_prompt else []
    return [*system, {"role": "user", "content": user}]


def of_row(format: Format, row: Columns) -> str:
    """The row's response prefix. Raises BadInput when the Format names a column and the row has no text there."""
    if format.per_row is None:
        return format.response_prefix
    columns = _columns(row)
    if format.per_row not in columns:
        raise BadInput(f"format.per_row: there is no column {format.per_row!r}; a row has {', '.join(columns)}")
    response_prefix = columns[format.per_row]
    if not isinstance(response_prefix, str):
        raise BadInput(
            f"format.per_row: found {response_prefix!r} in column {format.per_row!r}, expected text; a row has "
            f"{', '.join(columns)}"
        )
    return response_prefix


def _columns(row: Columns) -> Mapping[str, Any]:
    return row.columns() if isinstance(row, Row) else row


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Ids up to and including the generation prompt, without the prefix."""
    return [ids for ids, _ in chat.with_roles(tokenizer, [chat.pieces(tokenizer, turns) for turns in conversations])]


def prefix_ids(tokenizer: PreTrainedTokenizerBase, response_prefix: str) -> list[int]:
    """The prefix on its own. Raises BadInput when the tokenizer cannot write it down and read it back."""
    if response_prefix and str(tokenizer.eos_token) in response_prefix:
        raise BadInput(
            f"format.response_prefix: {response_prefix!r} holds {tokenizer.eos_token!r}, which ends the turn it would "
            "start"
        )
    if not response_prefix:
        return []
    ids = encode(tokenizer, response_prefix)
    decoded = tokenizer.decode(ids) if ids else ""
    if decoded != response_prefix:
        raise BadInput(
            f"format.response_prefix: {response_prefix!r} comes back from the tokenizer as {decoded!r}; choose another"
        )
    return ids


def prompts(tokenizer: PreTrainedTokenizerBase, format: Format, rows: Sequence[Columns]) -> list[Rendered]:
    """The prompt of each row, up to the generation prompt: what a sampler is given before the row's prefix."""
    return chat.with_roles(tokenizer, [chat.pieces(tokenizer, messages(format, row)) for row in rows])


def answer(start: Sequence[int], rest: Sequence[int]) -> Rendered:
    """Prefix ids and what follows them, with their roles."""
    return [*start, *rest], PREFIX * len(start) + COMPLETION * len(rest)


def demonstration(tokenizer: PreTrainedTokenizerBase, response_prefix: str, text: str) -> Rendered:
    """Prefix ids + the rest of a completion's text + turn end: the SFT target. Raises BadInput when the text does not
    start with the prefix, and when it leaves open what the chat template has opened.

    What the template has opened stands in the prompt, so it is taken from the start of a text that has it too.
    """
    opened = chat.opened(tokenizer)
    refuse_reopened(opened, response_prefix)
    return target(tokenizer, response_prefix, after_opened(opened, text))


def target(tokenizer: PreTrainedTokenizerBase, response_prefix: str, text: str) -> Rendered:
    """Prefix ids + the rest of what a policy says after its prompt + turn end. Raises BadInput when the text does not
    start with the prefix, and when it holds the end of a turn."""
    end = chat.end_token(tokenizer)
    if end in text:
        raise BadInput(
            f"an answer holds {end!r}, which ends a turn and is added where it does; remove it: {text[-40:]!r}"
        )
    if not text.startswith(response_prefix):
        raise BadInput(
            f"the response prefix is {response_prefix!r}, but a demonstration starts with {text[:40]!r}; make them "
            "agree"
        )
    rest = encode(tokenizer, text.removeprefix(response_prefix))
    return answer(prefix_ids(tokenizer, response_prefix), [*rest, *encode(tokenizer, chat.ending(tokenizer))])


def refuse_reopened(opened: str, response_prefix: str) -> None:
    """Raise BadInput for a prefix that starts with the tag that the template has opened."""
    if opened and response_prefix.strip().startswith(opened.strip()):
        raise BadInput(
            f"the chat template already ends its generation prompt in {opened!r}, and the response prefix "
            f"{response_prefix!r} would open it again; set format.response_prefix to what comes after it, or to ''"
        )


def after_opened(opened: str, text: str) -> str:
    """What of an answer comes after the tag that the template has opened; all of it for "". Raises BadInput for an
    answer that does not close the tag: it would be trained inside it."""
    if not opened:
        return text
    tag, close = opened.strip(), closing_tag(opened)
    if close not in text:
        raise BadInput(
            f"the chat template opens {tag!r} before every answer, and an answer does not close it: {text[:40]!r}; "
            f"begin the answer with {opened + opened[len(tag) :] + close + 2 * opened[len(tag) :]!r}, or set "
            f"format.chat_template to one that opens nothing"
        )
    if not text.lstrip().startswith(tag):
        return text
    return text.lstrip().removeprefix(tag).removeprefix(opened[len(tag) :])


def merges_at_boundary(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> bool:
    """Whether the tokenizer, left to itself, would put a token across the start of the row's first answer or across the
    end of its prefix."""
    edges = {len(cast(str, tokenizer.decode(row.ids[:edge]))) for edge in row.edges}
    encoded: Any = tokenizer(tokenizer.decode(row.ids), add_special_tokens=False, return_offsets_mapping=True)
    return not edges <= set(chat.starts(encoded["offset_mapping"]))


def completion_text(
    tokenizer: PreTrainedTokenizerBase, response_prefix: str, sampled: Sequence[int], ends: Collection[int]
) -> str:
    """The text that rewards and scores judge: what the template has opened, the prefix, and the sampled tokens.

    Every token counts, special tokens too, such as tags that a vocabulary holds. Left out is what stands around words:
    the end of the turn (one of `ends`), padding, and what begins a turn.
    """
    around = chat.around_words(tokenizer).union(ends)
    said = [id for id in sampled if id not in around]
    text = cast(str, tokenizer.decode(said, skip_special_tokens=False))
    before_end = _before_end(tokenizer, text) if sampled and sampled[-1] in ends else text
    return chat.opened(tokenizer) + response_prefix + before_end


def _before_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Without what the template writes between an answer and its end token (Cohere's <|END_RESPONSE|>)."""
    try:
        ending = chat.ending(tokenizer)
    except BadInput:
        return text  # a template that ends no turn writes nothing there
    return text.removesuffix(ending.removesuffix(chat.end_token(tokenizer)))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text on its own, without special tokens around it."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]))
