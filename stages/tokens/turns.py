"""How a chat template writes an assistant's turn, found by rendering probes: pure text, no tokenizer.

a function that renders messages + the tokens that stand alone in a vocabulary -> what ends a turn, what the generation
prompt leaves open, whether words are written as they are. The plan asks with a renderer of its own, the stages with
the tokenizer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the generation prompt follows) -> text. Raises TemplateError where the template refuses them."""
OPEN, CLOSE = "\ue000", "\ue001"
PROBE = f"{OPEN}0{CLOSE}"
"""Words that no template looks into."""
TAG = re.compile(r"(?:<(?P<angle>[A-Za-z][\w:-]*)>|\[(?P<square>[A-Za-z]\w*)\])\s*\Z")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a tokenizer has a name for."""
QUESTION: Message = {"role": "user", "content": "?"}
ANSWERS = ("3", " 3\n", "<think>\n3\n</think>\n\n4", "<think>3</think>4")
"""Words that templates are known to change: blanks around them, and reasoning."""


def declared_ends(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """Ids that a model ends a text with, from its generation settings or, where these do not say, its config."""
    found = generation.get("eos_token_id")
    found = config.get("eos_token_id") if found is None else found
    return found if isinstance(found, list) else [] if found is None else [found]


def ending(render: Render, alone: Collection[str], declared: Collection[str]) -> str:
    """The text that ends an assistant's turn, up to and including the token that stops the sampling; "" where none
    does.

    `alone` are the tokens that are never part of another, `declared` those that tokenizer and generation settings name
    as ends. The template decides: the first end after the answer that it also writes in the middle of a conversation,
    else the first such token. Where it writes none there, the first end at the end of a conversation (gpt-oss), else
    an end with which the next turn begins (GLM).
    """
    answered = [QUESTION, {"role": "assistant", "content": PROBE}]
    last = render(answered, False).rpartition(PROBE)[2]
    middle = render([*answered, {"role": "user", "content": f"{OPEN}1{CLOSE}"}], False).rpartition(PROBE)[2]
    middle = middle.partition(f"{OPEN}1{CLOSE}")[0]
    always = next(
        (n for n, (a, b) in enumerate(zip(last, middle, strict=False)) if a != b), min(len(last), len(middle))
    )
    found = [*_found(last, alone)]
    candidates = [
        *((last, end) for token, end in found if end <= always and token in declared),
        *((last, end) for _, end in found if end <= always),
        *((last, end) for token, end in found if token in declared),
        *((middle, end) for token, end in [*_found(middle, alone)][:1] if token in declared),
    ]
    return next((text[:end] for text, end in candidates), "")


def last_token(ending: str, alone: Collection[str]) -> str:
    """The token that an ending ends with."""
    return max((token for token in alone if ending.endswith(token)), key=len, default="")


def opened(prompt: str) -> str:
    """The tag, with the blanks after it, that a prompt ends in, such as "<think>\\n"; "" where it ends otherwise."""
    match = TAG.search(prompt)
    return match[0] if match else ""


def closing_tag(opened: str) -> str:
    """The tag that closes it: "</think>" of "<think>\\n"."""
    tag = opened.strip()
    return f"{tag[0]}/{tag[1:]}"


def generation_prompt(render: Render) -> str:
    """What begins the policy's turn after a question."""
    return render([QUESTION], True).removeprefix(render([QUESTION], False))


def beginning(render: Render, special: Collection[str]) -> list[str]:
    """The control tokens with which the policy's turn begins, such as <|im_start|>; not a tag that is left open."""
    prompt = generation_prompt(render)
    left, found = prompt.removesuffix(opened(prompt)), list[str]()
    while token := max((token for token in special if token and left.startswith(token)), key=len, default=""):
        found.append(token)
        left = left.removeprefix(token)
    return found


def opened_by(render: Render) -> str:
    """What the generation prompt leaves open after a question."""
    return opened(generation_prompt(render))


def rewrites(render: Render) -> bool:
    """Whether a conversation is rendered otherwise than its prompt, the answer's words as they are, and the end of the
    turn."""
    prompt = render([QUESTION], True)
    return not all(
        render([QUESTION, {"role": "assistant", "content": words}], False).startswith(prompt + words)
        for words in ANSWERS
    )


def _found(text: str, alone: Collection[str]) -> Iterator[tuple[str, int]]:
    """(token, where it ends), from left to right; the longest where several begin at one place."""
    words = sorted((re.escape(token) for token in alone if token), key=len, reverse=True)
    for match in re.finditer("|".join(words), text) if words else ():
        yield match[0], match.end()
