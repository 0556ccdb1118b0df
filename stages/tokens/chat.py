"""The chat template: messages become text, and every piece of the text knows whose words it is.

    messages -> [(role, text), ...] up to the policy's turn -> ids with a role each

Roles are found by rendering a second time with a mark around the words of every message; where the template then says
something else, it reads or changes the words, and is refused rather than guessed at. The prompt is tokenised as one
string, as TRL and `apply_chat_template` do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from stages.errors import BadInput
from stages.tokens.token_rows import SYSTEM, TEMPLATE, USER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Pieces = list[tuple[str, str]]
"""(letter of the role, text); together they are the whole text."""

TRAINING = "training"
"""Name of the training template, next to the serving template: additional_chat_templates/training.jinja."""
OPEN, CLOSE = "\ue000", "\ue001"
MARKED = re.compile(f"{OPEN}(\\d+){CLOSE}")


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template everything is rendered with: the one a switchback policy carries, else the model's own."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        return templates.get(TRAINING) or templates["default"]
    return cast(str, templates)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The prompt as text, generation prompt included. Raises BadInput when it ends in an assistant turn, or when the
    template refuses it."""
    if not messages:
        raise BadInput("a conversation starts with an assistant turn; start it with the user's")
    if messages[-1]["role"] == "assistant":
        raise BadInput(
            f"a prompt ends in an assistant turn ({messages[-1]['content'][:40]!r}); end it with the user's, and say "
            "how answers start with format.response_prefix"
        )
    return _rendered(tokenizer, messages)


def pieces(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Pieces:
    """The text of `render`, in pieces. Raises BadInput when the template drops or changes the words of a message."""
    text = render(tokenizer, messages)
    marked = [{**message, "content": f"{OPEN}{i}{CLOSE}"} for i, message in enumerate(messages)]
    skeleton = MARKED.split(_rendered(tokenizer, marked))
    for words in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        found = _filled(skeleton, messages, words)
        if "".join(piece for _, piece in found) == text:
            _nothing_is_dropped(skeleton, messages)
            return found
    raise BadInput(
        "the chat template changes the words of a message, so what is prompt and what is template cannot be told; use "
        "another template"
    )


def _filled(skeleton: list[str], messages: Sequence[Message], words: list[str]) -> Pieces:
    """`skeleton` alternates template text and numbers of messages."""
    letters = {"system": SYSTEM, "developer": SYSTEM}
    found = [(TEMPLATE, skeleton[0])]
    for number, after in zip(skeleton[1::2], skeleton[2::2], strict=True):
        found.append((letters.get(messages[int(number)]["role"], USER), words[int(number)]))
        found.append((TEMPLATE, after))
    return [(letter, piece) for letter, piece in found if piece]


def _nothing_is_dropped(skeleton: list[str], messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if message["content"] and str(i) not in skeleton[1::2]:
            raise BadInput(
                f"the chat template drops the {message['role']} message; move its words into the user template, or use "
                "another chat template"
            )


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    template = training_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BadInput(f"the chat template refuses a conversation of {roles}: {' '.join(str(error).split())}") from None
    return cast(str, text)


def with_roles(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Pieces]) -> list[tuple[list[int], str]]:
    """(ids, a role letter a token) of each text; a token that lies in two pieces has the role of its first character.

    Raises BadInput for a tokenizer that cannot say where in the text a token lies.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} cannot say where in a text its tokens lie; use a model with a fast tokenizer"
        )
    texts = ["".join(piece for _, piece in prompt) for prompt in prompts]
    encoded: dict[str, Any] = dict(tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True))
    roles = ["".join(letter * len(piece) for letter, piece in prompt) for prompt in prompts]
    return [
        (list(ids), "".join(letters[start] if start < len(letters) else TEMPLATE for start in starts(offsets)))
        for ids, offsets, letters in zip(encoded["input_ids"], encoded["offset_mapping"], roles, strict=True)
    ]


def starts(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Where each token begins: where the one before it ended, because some tokenizers leave blanks out of a token's
    offsets."""
    return [0, *(end for _, end in offsets[:-1])] if offsets else []


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends the policy's turn. Raises BadInput when the template does not end a turn with the tokenizer's
    eos token."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = tokenizer.apply_chat_template(turn, chat_template=training_template(tokenizer), tokenize=False)
    ending = cast(str, text).rpartition("!")[2]
    if str(tokenizer.eos_token) not in ending:
        raise BadInput(
            f"the chat template ends an assistant turn with {ending!r}, which does not hold the tokenizer's eos token"
            f" {tokenizer.eos_token!r}; set the eos token that ends a turn"
        )
    return cast(int, tokenizer.eos_token_id)
