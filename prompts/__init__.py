"""Prompts: one Markdown file each, loaded by name or by path, identified by content.

    ---
    purpose: what it is for, in one line
    format: what a completion should look like (optional, for people)
    follow: a regular expression found in a completion that follows the prompt (optional, counted by `switchback probe`)
    ---
    # system
    What the system message says; leave it empty for none.
    # user
    {{ prompt }}

`# user` is a jinja2 template that sees the fields of a row. Editing a file moves the key of every step that uses it;
renaming it does not.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import TemplateSyntaxError

from prompts import templates

HERE = Path(__file__).parent
FRONT = ("purpose", "format", "follow")
SHAPE = re.compile(r"---\n(?P<front>.*?)\n---\n+# system\n(?P<system>.*?)\n?# user\n(?P<user>.*)", re.S)


@dataclass(frozen=True)
class Prompt:
    """The contents of one file."""

    name: str
    purpose: str
    format: str
    """The form of a completion, for people; "" when the file does not describe it."""
    follow: str | None
    """Found (re.search, response prefix included) in a completion that does what the prompt says; None when nothing is
    asked."""
    system_prompt: str
    """Without surrounding blank space; "" for none."""
    user_template: str
    digest: str
    """SHA-256 of what reaches the model: system prompt and user template."""


def names() -> list[str]:
    """The prompts that can be loaded by name."""
    return sorted(path.stem for path in HERE.glob("*.md"))


def load(name: str) -> Prompt:
    """A prompt by name, or by the path of an .md file. Raises ValueError, one line, when it is not there or has another
    shape."""
    path = Path(name) if name.endswith(".md") else HERE / f"{name}.md"
    if not name.endswith(".md") and name not in names():
        raise ValueError(f"no prompt named {name!r}; there are {', '.join(names())}, or give the path of an .md file")
    if not path.is_file():
        raise ValueError(f"the prompt file {name} is not there")
    try:
        return parse(path.stem, path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompt file {name} cannot be read as text: {error}") from None


def parse(name: str, text: str) -> Prompt:
    """A prompt from the text of its file. Raises ValueError when a part is missing."""
    match = SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"the prompt {name} needs front matter between --- lines, then '# system', then '# user'")
    front = _front_matter(name, match["front"])
    system, user = match["system"].strip(), match["user"].strip("\n")
    try:
        templates.compiled(user)
    except TemplateSyntaxError as error:
        raise ValueError(f"the user template of the prompt {name}, line {error.lineno}: {error.message}") from None
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"the user template of the prompt {name}: {type(error).__name__}: {error}") from None
    if "{{" in system or "{%" in system:
        raise ValueError(
            f"the system prompt of the prompt {name} holds a template, but only '# user' is one; write it out"
        )
    digest = hashlib.sha256(f"{system}\0{user}".encode()).hexdigest()
    return Prompt(name, front.get("purpose", ""), front.get("format", ""), front.get("follow"), system, user, digest)


def _front_matter(name: str, text: str) -> dict[str, str]:
    try:
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        front = {} if aliases else yaml.safe_load(text) or {}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the front matter of the prompt {name}: {type(error).__name__}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter of the prompt {name}: {' '.join(str(error).split())}") from None
    if aliases:
        raise ValueError(f"the front matter of the prompt {name} holds an alias (*), expected words. Fix: quote it")
    if not isinstance(front, dict):
        raise ValueError(f"the front matter of the prompt {name} is {front!r}, expected a mapping such as purpose: ...")
    for key, value in front.items():
        if key not in FRONT or not isinstance(value, str):
            raise ValueError(
                f"the front matter of the prompt {name} has {key}: {value!r}, expected text under {', '.join(FRONT)}"
            )
    try:
        re.compile(front.get("follow", ""))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the front matter of the prompt {name}: follow is no regular expression: {error}") from None
    return front
