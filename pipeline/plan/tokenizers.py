"""What a base model's tokenizer and chat template decide beyond their bytes, found without transformers.

the files of a model + the template in force -> what of a step's identity says by which rules its tokens were made.
Versions of these rules differ for some tokenizers only, and only those steps have an entry: what the resolved rule
found, where it is not what the first version took (the eos token ends a turn, answers are rendered as they are,
rewards see no control tokens). For a model on the hub nothing can be read here, so its steps have the rules' version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.errors import BadInput
from stages.stage import Stage
from stages.tokens import limits, sandbox, turns

RULES = 2
"""Version of the rules, for a tokenizer that cannot be read here."""
TEMPLATE = "the chat template of the model"
"""Its name in messages."""


@dataclass(frozen=True)
class Tokenizer:
    """What of a tokenizer its files say."""

    alone: frozenset[str]
    """Tokens that are never part of another."""
    special: frozenset[str]
    """Those of them that are control tokens."""
    named: tuple[tuple[str, str], ...]
    """(name, token), of `turns.NAMED`; templates may write them."""
    declared: frozenset[str]
    """Tokens that the model's generation settings end a text with."""
    template: str
    """Its chat template; "" for none."""

    @property
    def eos(self) -> str:
        """The token that ends a text; "" for none."""
        return dict(self.named).get("eos_token", "")


Files = Callable[[str], bytes | None]
"""The bytes of a model's file by its name; None for no such file."""


def of_directory(directory: Path) -> Tokenizer | None:
    """`read` of a model's directory."""
    return read(lambda name: (directory / name).read_bytes() if (directory / name).is_file() else None)


def read(files: Files) -> Tokenizer | None:
    """The tokenizer of a model; None where its files do not say."""
    try:
        added = _added_tokens((files("tokenizer.json") or b"").decode())
        config = {**_json(files("special_tokens_map.json")), **_json(files("tokenizer_config.json"))}
        ends = turns.declared_ends(_json(files("generation_config.json")), _json(files("config.json")))
        by_id = {token["id"]: token["content"] for token in added}
        return Tokenizer(
            alone=frozenset(by_id.values()),
            special=frozenset(token["content"] for token in added if token["special"]),
            named=tuple((name, token) for name in turns.NAMED if (token := _content(config.get(name)))),
            declared=frozenset(by_id[id] for id in ends if id in by_id),
            template=_template(files, config.get("chat_template")),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def identity(tokenizer: Tokenizer | None, template: str | None, kind: Stage, config: Config) -> dict[str, Any]:
    """What of a step's identity its tokens add; {} where the first version of the rules gave the same. `template` is
    that of its Format; None: the tokenizer's own."""
    if tokenizer is None:
        return {"rules": RULES}
    found = _resolved(tokenizer, template or tokenizer.template)
    asks = kind.samples(config) or kind.rewards(config) is not None
    concerned = {
        "turn_end": kind.trains or (asks and found.get("seen_otherwise", False)),
        "opened": kind.trains or asks,
        "control_tokens": asks,
        "answers": any(read.output is None for read in kind.reads(config)),
    }
    return {name: found[name] for name, is_concerned in concerned.items() if is_concerned and name in found}


@lru_cache(maxsize=16)
def _resolved(tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """Where the rules differ from their first version: name -> what they found. Raises BadInput for a template that
    does not end."""
    return dict(_differences(tokenizer, template)) if template else {}


def _differences(tokenizer: Tokenizer, template: str) -> Iterator[tuple[str, Any]]:
    ends = {tokenizer.eos} | tokenizer.declared
    known = {token for _, token in tokenizer.named} | ends
    limits.refuse_endless(TEMPLATE, template, lambda: str([*_probes(tokenizer, template, ends)]))
    probed = _probed(tokenizer, template, ends)
    ending, opened, begins = probed.get("ending", ""), probed.get("opened", ""), probed.get("begins", [])
    if tokenizer.special - known - {*begins} or ends - tokenizer.special - {""}:
        yield "control_tokens", "seen"
    if ending and ending != tokenizer.eos:
        yield "turn_end", ending
        last = turns.last_token(ending, tokenizer.alone)
        before = [piece for piece in _between(ending.removesuffix(last), tokenizer.special) if piece]
        yield "seen_otherwise", last not in ends or bool(before)
    if opened:
        yield "opened", opened
    if probed.get("rewrites"):
        yield "answers", "as rendered"


def _probed(tokenizer: Tokenizer, template: str, ends: set[str]) -> dict[str, Any]:
    """What the template answers to probes, up to the first that it does not take."""
    found: dict[str, Any] = {}
    try:
        with limits.timed(TEMPLATE):
            for name, answer in _probes(tokenizer, template, ends):
                found[name] = answer
    except BadInput:
        raise
    except Exception:  # a template can raise anything; a stage says so, where it renders with it
        return found
    return found


def _probes(tokenizer: Tokenizer, template: str, ends: set[str]) -> Iterator[tuple[str, Any]]:
    render = sandbox.renderer(template, dict(tokenizer.named))
    yield "ending", turns.ending(render, tokenizer.alone, ends)
    opened, rewrites = turns.opened_by(render), turns.rewrites(render)
    yield "opened", opened
    yield "rewrites", rewrites
    yield "begins", turns.beginning(render, tokenizer.special)


def _between(text: str, special: frozenset[str]) -> list[str]:
    """What stands between control tokens, which rewards never saw."""
    return re.split("|".join(re.escape(token) for token in special if token), text) if special else [text]


def _added_tokens(text: str) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, whose vocabulary of megabytes is not parsed."""
    name = '"added_tokens":'
    start = text.index(name) + len(name)
    return json.JSONDecoder().raw_decode(text, start + len(text[start:]) - len(text[start:].lstrip()))[0]


def _template(files: Files, configured: Any) -> str:
    """The template that stages render with: a policy's training template, else the model's own."""
    for name in ("additional_chat_templates/training.jinja", "chat_template.jinja"):
        content = files(name)
        if content is not None:
            return content.decode()
    if isinstance(configured, list):
        configured = {one["name"]: one["template"] for one in configured}.get("default")
    return configured or ""


def _content(token: Any) -> str:
    """A token's text, which may be written with its settings."""
    return token["content"] if isinstance(token, dict) else token or ""


def _json(content: bytes | None) -> dict[str, Any]:
    """A file of settings; {} for none."""
    return json.loads(content) if content is not None else {}
