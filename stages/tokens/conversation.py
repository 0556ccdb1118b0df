"""A whole conversation as one row: what the chat template renders of it, cut where the policy speaks.

    the template's text:   ...prompt 1 | answer 1, turn end | ...prompt 2 | answer 2, turn end | what is left out
    the row's roles:          s u t      p c ...      c        u t          p c ...      c

Each answer stands where serving would put it: after the prompt that `apply_chat_template` makes of the turns before it.
Its words are those of the message, as the template writes them: a template may trim blanks or put something before
them. What it would leave out of an answer, or write otherwise in a later prompt than it was trained, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stages.errors import BadInput
from stages.tokens import chat, prefix
from stages.tokens.turns import CLOSE, OPEN, Message, closing_tag, opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STARTS_WITH_OPENED, BLANKS, ADDED = "starts_with_opened", "blanks", "added"
"""What a reader should know of a row: an answer starts with what the template has opened, so that it is trained once;
the template writes its blanks otherwise; the template puts something before it, which is trained with it."""

WRITTEN_OTHERWISE = (
    "the chat template writes an earlier assistant turn otherwise than it is trained (it drops its reasoning, or adds "
    "to it), so the conversation cannot be trained as it will be served; give each turn a row of its own: "
    '{"prompt": [the turns before it], "completion": [the turn]}'
)


class Conversation(NamedTuple):
    """A row's tokens."""

    ids: list[int]
    roles: str
    """A letter a token."""
    notes: tuple[str, ...]
    """What of `STARTS_WITH_OPENED`, `BLANKS`, `ADDED` is true of one of its answers."""


def rendered(
    tokenizer: PreTrainedTokenizerBase, response_prefix: str, turns: Sequence[Message], given: int = 0
) -> Conversation:
    """Every assistant turn after the first `given` turns is completion and starts with the prefix. Raises BadInput for
    a conversation that does not end with an assistant turn, and where what is trained would not be what the template
    renders."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadInput("a conversation does not end with an assistant turn; remove what comes after the last one")
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given]
    shown, notes = _shown(tokenizer, response_prefix, turns, answers)
    whole, ending = chat.rendered(tokenizer, shown, False), chat.ending(tokenizer)
    ids, roles, context = list[int](), "", ""
    for i in answers:
        prompt = chat.render(tokenizer, shown[:i])
        if not prompt.startswith(context):
            raise BadInput(WRITTEN_OTHERWISE)
        ((asked, letters),) = chat.with_roles(tokenizer, [_after(len(context), chat.pieces(tokenizer, shown[:i]))])
        text, note = _said(tokenizer, shown, i, prompt, whole)
        target, target_letters = prefix.target(tokenizer, response_prefix, text)
        ids, roles = [*ids, *asked, *target], roles + letters + target_letters
        notes, context = notes | {note} - {""}, f"{prompt}{text}{ending}"
    return Conversation(ids, roles, tuple(sorted(notes)))


def _shown(
    tokenizer: PreTrainedTokenizerBase, response_prefix: str, turns: Sequence[Message], answers: Sequence[int]
) -> tuple[list[Message], set[str]]:
    """The turns as the template is to be shown them: where a prompt leaves a tag open, an answer goes on from it. And
    what there is to say."""
    shown, notes = list(turns), set[str]()
    for i in answers if chat.opened(tokenizer) else ():
        prompt = chat.render(tokenizer, shown[:i])
        if tag := opened(prompt):
            words = shown[i]["content"]
            shown[i] = _going_on(tokenizer, response_prefix, shown[: i + 1], prompt)
            notes |= {STARTS_WITH_OPENED} if words.lstrip().startswith(tag.strip()) else set()
    return shown, notes


def _going_on(
    tokenizer: PreTrainedTokenizerBase, response_prefix: str, turns: Sequence[Message], prompt: str
) -> Message:
    """The last answer, in the form in which the template lets it go on from the tag that the prompt leaves open: as it
    is, where the template closes the tag itself; with the tag; or with its reasoning in a field of its own. Raises
    BadInput where it leaves the tag open."""
    *before, turn = turns
    tag, words = opened(prompt), turn["content"]
    prefix.refuse_reopened(tag, response_prefix)
    if closing_tag(tag) not in words:
        text = _text(tokenizer, turns, prompt)
        if text is not None and _without_blanks(text).endswith(_without_blanks(words)):
            return turn
    with_tag = tag + prefix.after_opened(tag, words)
    reasoning, _, rest = with_tag.removeprefix(tag).partition(closing_tag(tag))
    for form in (with_tag, rest):
        message = {**turn, "content": form} | ({"reasoning_content": reasoning} if form == rest else {})
        text = _text(tokenizer, [*before, message], prompt)
        if text is not None and _without_blanks(tag + text) == _without_blanks(with_tag):
            return message
    return {**turn, "content": with_tag}


def _text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], prompt: str) -> str | None:
    """What the template writes after the prompt for the last answer; None where it goes on otherwise."""
    whole = chat.rendered(tokenizer, turns, False)
    return whole[len(prompt) :].partition(chat.ending(tokenizer))[0] if whole.startswith(prompt) else None


def _said(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], i: int, prompt: str, whole: str
) -> tuple[str, str]:
    """What the template writes as answer `i`, which its prompt and its turn end enclose in the whole text, and the
    note of it ("" for none)."""
    words, last = turns[i]["content"], i == len(turns) - 1
    tag = opened(prompt) if chat.opened(tokenizer) else ""
    if chat.end_token(tokenizer) in words:
        return words, ""  # `prefix.target` refuses it
    if not whole.startswith(prompt):
        if tag and last:  # the template leaves its reasoning out of what was said (DeepSeek-R1), not out of serving
            return words.removeprefix(tag), ""
        raise BadInput(_unreachable(prompt, whole) if last else WRITTEN_OTHERWISE)
    text, ended, _ = whole[len(prompt) :].partition(chat.ending(tokenizer))
    note = _note(tokenizer, turns, i, tag, text) if ended or last else None
    if note is not None:
        return text, note
    if not last:
        raise BadInput(WRITTEN_OTHERWISE)
    raise BadInput(
        f"the chat template writes an answer otherwise than its message ({text[:60]!r} for {words[:60]!r}), so what is "
        f"trained would not be what it renders; write it as the template does, or set format.chat_template"
    )


def _note(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], i: int, tag: str, text: str) -> str | None:
    """How a text says the words of answer `i`; None where it does not."""
    words = turns[i]["content"]
    if "reasoning_content" in turns[i]:
        words = f"{tag}{turns[i]['reasoning_content']}{closing_tag(tag)}{words}"
    if tag + text == words:
        return ""
    if _without_blanks(tag + text) == _without_blanks(words):
        return BLANKS
    before = _put_before(tokenizer, turns, i)
    twice = any(close in words for close in re.findall(r"</\w+>", before))
    return ADDED if not twice and _without_blanks(text) == _without_blanks(before + words) else None


def _put_before(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], i: int) -> str:
    """What the template puts before answer `i` whatever it says, such as an empty block of reasoning."""
    marked = [{**turn, "content": f"{OPEN}{n}{CLOSE}"} for n, turn in enumerate(turns)]
    prompt, whole = chat.rendered(tokenizer, marked[:i], True), chat.rendered(tokenizer, marked, False)
    return whole[len(prompt) :].partition(marked[i]["content"])[0] if whole.startswith(prompt) else ""


def _unreachable(prompt: str, whole: str) -> str:
    """Why no answer of the kind can follow the prompt."""
    same = next(
        (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    return (
        f"the chat template ends the prompt in {prompt[same:][-60:]!r} where it renders the answer as "
        f"{whole[same:][:60]!r}, so the policy cannot give that answer; leave its reasoning out (up to the closing "
        f"tag), join an answer to the one before it, or set format.chat_template"
    )


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def _after(start: int, pieces: chat.Pieces) -> chat.Pieces:
    """The pieces of the text after its first `start` characters."""
    left: chat.Pieces = []
    for letter, piece in pieces:
        if start < len(piece):
            left.append((letter, piece[start:]))
        start = max(0, start - len(piece))
    return left
