"""The response prefix: the only module that knows where it is added, and what a policy is served with.

A row becomes messages, messages become prompt ids by the *training template* (`stages.tokens.chat`), and a completion
is prefix + what was sampled:

    prompt ids | prefix ids | sampled ids, turn end

The prefix is tokenised on its own and never together with what stands before or after it, so the boundary is the same
in SFT, RL, rejection sampling and evaluation. SFT trains prefix + sampled as the completion; sampling gives the model
prompt + prefix; rewards, saved rollouts and scores see prefix + sampled as text. Serving needs none of this: the
*serving template* ends its generation prompt with the prefix.

A Format has one prefix, or says which column gives each row its own (`per_row`); the serving template then adds none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from stages.errors import BadInput
from stages.job import Format
from stages.problems.base import Row
from stages.tokens import chat
from stages.tokens.chat import Message
from stages.tokens.token_rows import COMPLETION, PREFIX, TokenRow

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
    try:
        user = _compiled(format.user_template).render(columns)
    except TemplateError as error:
        raise BadInput(f"prompt {format.prompt}: {error}; a row has {', '.join(columns)}") from None
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
    start with the prefix."""
    if str(tokenizer.eos_token) in text:
        raise BadInput(
            f"an answer holds {tokenizer.eos_token!r}, which ends a turn and is added where it does; remove it: "
            f"{text[-40:]!r}"
        )
    if not text.startswith(response_prefix):
        raise BadInput(
            f"the response prefix is {response_prefix!r}, but a demonstration starts with {text[:40]!r}; make them "
            "agree"
        )
    rest = encode(tokenizer, text.removeprefix(response_prefix))
    return answer(prefix_ids(tokenizer, response_prefix), [*rest, chat.turn_end(tokenizer)])


def conversation(
    tokenizer: PreTrainedTokenizerBase, response_prefix: str, turns: Sequence[Message], given: int = 0
) -> Rendered:
    """A whole conversation as one row: every assistant turn after the first `given` turns is completion and starts with
    the prefix.

    Each turn stands where serving would put it: what the template makes of the turns before it must begin with what was
    trained so far. Raises BadInput where it does not (templates that drop earlier reasoning), and for a conversation
    that does not end with an assistant turn.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise BadInput("a conversation does not end with an assistant turn; remove what comes after the last one")
    ids, roles, context = list[int](), "", ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < given:
            continue
        text = chat.render(tokenizer, turns[:i])
        if not text.startswith(context):
            raise BadInput(
                "the chat template writes an earlier assistant turn otherwise than it is trained (it drops its "
                "reasoning, or adds to it), so the conversation cannot be trained as it will be served; give each turn "
                "a row of its own"
            )
        ((prompt, letters),) = chat.with_roles(tokenizer, [_after(len(context), chat.pieces(tokenizer, turns[:i]))])
        target, target_letters = demonstration(tokenizer, response_prefix, turn["content"])
        ids, roles = [*ids, *prompt, *target], roles + letters + target_letters
        context = f"{text}{turn['content']}{tokenizer.eos_token}"
    return ids, roles


def _after(start: int, pieces: chat.Pieces) -> chat.Pieces:
    """The pieces of the text after its first `start` characters."""
    left: chat.Pieces = []
    for letter, piece in pieces:
        if start < len(piece):
            left.append((letter, piece[start:]))
        start = max(0, start - len(piece))
    return left


def merges_at_boundary(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> bool:
    """Whether the tokenizer, left to itself, would put a token across the start of the row's first answer or across the
    end of its prefix."""
    edges = {len(cast(str, tokenizer.decode(row.ids[:edge]))) for edge in row.edges}
    encoded: Any = tokenizer(tokenizer.decode(row.ids), add_special_tokens=False, return_offsets_mapping=True)
    return not edges <= set(chat.starts(encoded["offset_mapping"]))


def completion_text(tokenizer: PreTrainedTokenizerBase, response_prefix: str, sampled: Sequence[int]) -> str:
    """The text that rewards and scores judge: the prefix, then the sampled tokens."""
    return response_prefix + cast(str, tokenizer.decode(list(sampled), skip_special_tokens=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text on its own, without special tokens around it."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]))


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
