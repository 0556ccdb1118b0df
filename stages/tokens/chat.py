"""The chat template: messages become text, and every piece of the text knows whose words it is.

    messages -> [(role, text), ...] up to the policy's turn -> ids with a role each

Roles are found by rendering a second time with a mark around the words of every message. A template may trim the words
of some messages and leave the reasoning out of earlier answers; where it changes words otherwise, it is refused rather
than guessed at. The prompt is tokenised as one string, as TRL and `apply_chat_template` do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from prompts.templates import ADVICE, address
from stages.errors import BadInput
from stages.tokens import limits, turns
from stages.tokens.token_rows import SYSTEM, TEMPLATE, USER
from stages.tokens.turns import CLOSE, OPEN, Message, Render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = list[tuple[str, str]]
"""(letter of the role, text); together they are the whole text."""

WHAT = "the chat template"
"""Its name in messages."""
TRAINING = "training"
"""Name of the training template, next to the serving template: additional_chat_templates/training.jinja."""
MARKED = re.compile(f"{OPEN}(\\d+){CLOSE}")
LETTERS = {"system": SYSTEM, "developer": SYSTEM}
"""Role of a message -> letter of its words, where they are not a user's."""


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
    return rendered(tokenizer, messages, True)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool) -> str:
    """What the template makes of messages. Raises BadInput when it refuses them."""
    try:
        return _renderer(tokenizer)(messages, generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        if _takes_parts(tokenizer):
            raise BadInput(
                "the chat template takes messages in parts, as those of vision models do, and token weights are for "
                "text; use the text model of its family, or set format.chat_template"
            ) from None
        raise BadInput(
            f"the chat template refuses a conversation of {roles}: {' '.join(str(error).split())}; leave out the turns "
            "that it has no place for, or set format.chat_template"
        ) from None


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template refuses a question as text, and takes it as a list of parts."""
    question: Any = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    try:
        _renderer(tokenizer)([turns.QUESTION], True)
    except TemplateError:
        try:
            return "?" in _renderer(tokenizer)([question], True)
        except TemplateError:
            return False
    return False


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    """The template as a function. It raises TemplateError, and BadInput for a template that does not end or writes
    where an object lies in memory, which is elsewhere in each process."""

    def render(messages: Sequence[Message], generation_prompt: bool) -> str:
        template = training_template(tokenizer)

        def text() -> str:
            made = tokenizer.apply_chat_template(
                list(messages), chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
            )
            return cast(str, made)

        limits.refuse_endless(WHAT, template, text)
        made = limits.rendered(WHAT, text)
        if found := address(made, template, list(messages)):
            raise BadInput(
                f"{WHAT} writes the address of an object ({found!r}), and {ADVICE}. Fix: set format.chat_template to "
                f"one without it"
            )
        return made

    return render


def pieces(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Pieces:
    """The text of `render`, in pieces. Raises BadInput when the template drops or changes the words of a message.

    Words of an earlier answer are a user's. Where the template takes reasoning out of them, the first rendering does
    not fit, and in the second they stay as they are.
    """
    text = render(tokenizer, messages)
    answers = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    for unmarked in (set[int](), answers):
        skeleton = MARKED.split(rendered(tokenizer, _marked(messages, unmarked), True))
        found = _filled(text, skeleton, messages)
        if found is not None:
            _nothing_is_dropped(skeleton, messages, unmarked)
            return _with_answers(found, [messages[i]["content"] for i in sorted(unmarked)])
    raise BadInput(
        "the chat template changes the words of a message, so switchback cannot separate them from the template; use "
        "another template (format.chat_template)"
    )


def _marked(messages: Sequence[Message], unmarked: Collection[int]) -> list[Message]:
    """Messages with a mark in place of their words; a message without words has none, since templates skip it."""
    return [
        {**message, "content": f"{OPEN}{i}{CLOSE}"} if message["content"] and i not in unmarked else message
        for i, message in enumerate(messages)
    ]


def _filled(text: str, skeleton: list[str], messages: Sequence[Message]) -> Pieces | None:
    """The text, cut where the words of messages stand in it; None where they do not fit. `skeleton` alternates
    template text and numbers of messages."""
    reached: dict[int, Pieces] = {}
    if text.startswith(skeleton[0]):
        reached[len(skeleton[0])] = [(TEMPLATE, skeleton[0])]
    for number, after in zip(skeleton[1::2], skeleton[2::2], strict=True):
        message, before, reached = messages[int(number)], reached, {}
        letter = LETTERS.get(message["role"], USER)
        for at, found in before.items():
            for words in _as_written(message):
                if text.startswith(words + after, at):
                    reached.setdefault(at + len(words + after), [*found, (letter, words), (TEMPLATE, after)])
    whole = reached.get(len(text))
    return None if whole is None else [(letter, piece) for letter, piece in whole if piece]


def _as_written(message: Message) -> Iterator[str]:
    """The words of a message as templates write them: as they are, trimmed, or, of a tool, as JSON."""
    words = message["content"]
    yield from dict.fromkeys((words, words.strip(), words.lstrip(), words.rstrip()))
    if message["role"] == "tool":
        yield json.dumps(words, ensure_ascii=False)


def _nothing_is_dropped(skeleton: list[str], messages: Sequence[Message], unmarked: Collection[int]) -> None:
    for i, message in enumerate(messages):
        if message["content"] and i not in unmarked and str(i) not in skeleton[1::2]:
            raise BadInput(
                f"the chat template drops the {message['role']} message; move its words into the user's (for a system "
                "prompt: into the user template), or set format.chat_template"
            )


def _with_answers(found: Pieces, answers: Sequence[str]) -> Pieces:
    """Pieces in which the words of earlier answers, which stand in template text, are a user's."""
    left, cut = list(answers), Pieces()
    for letter, piece in found:
        rest = piece
        while letter == TEMPLATE and left and (said := _said_in(rest, left[0])):
            before, _, rest = rest.partition(said)
            cut += [(TEMPLATE, before), (USER, said)]
            left.pop(0)
        cut.append((letter, rest))
    return [(letter, piece) for letter, piece in cut if piece]


def _said_in(piece: str, answer: str) -> str:
    """What of an answer stands in a piece: all of it, or what comes after its reasoning; "" for nothing."""
    after_reasoning = re.split(r"</\w+>|\[/\w+\]", answer)[-1].strip()
    return next((words for words in (answer, answer.strip(), after_reasoning) if words and words in piece), "")


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


def end_turns_as_the_template(tokenizer: PreTrainedTokenizerBase, declared: Collection[int]) -> None:
    """Make the token that ends the template's assistant turns the tokenizer's eos token. `declared` are the ends of the
    model's generation settings.

    Models such as gemma-3-it and Phi-3.5 name the end of a text there, which no turn ends with. A template that ends
    no turn, or refuses a probe, changes nothing: `ending` says so where it matters.
    """
    tokens = {str(tokenizer.eos_token), *(str(tokenizer.convert_ids_to_tokens(id)) for id in declared)}
    try:
        found = turns.ending(_renderer(tokenizer), alone(tokenizer), tokens)
    except TemplateError:
        return
    token = turns.last_token(found, alone(tokenizer))
    if token and token != tokenizer.eos_token:
        tokenizer.eos_token = token


def ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that ends the policy's turn, such as "<|im_end|>". Raises BadInput when no token ends a turn of the
    template."""
    return _ending(tokenizer, training_template(tokenizer), str(tokenizer.eos_token))


@lru_cache(maxsize=16)
def _ending(tokenizer: PreTrainedTokenizerBase, template: str, eos: str) -> str:
    try:
        found = turns.ending(_renderer(tokenizer), alone(tokenizer), {eos})
    except TemplateError as error:
        raise BadInput(f"the chat template refuses a question and an answer: {' '.join(str(error).split())}") from None
    if not found:
        answered = [turns.QUESTION, {"role": "assistant", "content": turns.PROBE}]
        written = rendered(tokenizer, answered, False).rpartition(turns.PROBE)[2]
        raise BadInput(
            f"the chat template ends an assistant turn with {written!r}, which does not hold the tokenizer's eos token"
            f" {eos!r} or another token of its vocabulary that stands alone; set format.chat_template to one that "
            f"writes {eos!r} after an answer"
        )
    return found


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends the policy's turn: the last of its ending. Raises BadInput as `ending` does."""
    return turns.last_token(ending(tokenizer), alone(tokenizer))


def opened(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tag that the generation prompt leaves open, such as "<think>\\n": it is the start of what the policy says,
    and stands in the prompt. "" for none."""
    return _opened(tokenizer, training_template(tokenizer))


@lru_cache(maxsize=16)
def _opened(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    try:
        return turns.opened_by(_renderer(tokenizer))
    except TemplateError:
        return ""


def around_words(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of control tokens that are around words and never among them: those with a name (padding, unknown, ...), and
    those with which the policy's turn begins."""
    return _around_words(tokenizer, training_template(tokenizer), str(tokenizer.eos_token))


@lru_cache(maxsize=16)
def _around_words(tokenizer: PreTrainedTokenizerBase, template: str, eos: str) -> frozenset[int]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {str(token) for name in turns.NAMED if (token := getattr(tokenizer, name, None))}
    try:
        begins = turns.beginning(_renderer(tokenizer), special)
    except TemplateError:
        begins = []
    tokens = sorted({*(special & named), *begins})
    return frozenset(cast(list[int], tokenizer.convert_tokens_to_ids(tokens)))


def alone(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that are never part of another: those that were added to the vocabulary, control tokens among them."""
    return {token.content for token in tokenizer.added_tokens_decoder.values()}
