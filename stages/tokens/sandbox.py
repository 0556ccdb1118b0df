"""Chat templates without a tokenizer: compiled in the environment that transformers gives them.

The plan renders probes here, and a preflight looks at a template's source, both without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prompts.templates import ADVICE, dice
from stages.errors import BadInput
from stages.tokens.turns import Message, Render


def renderer(template: str, named: dict[str, str]) -> Render:
    """A template as a function; `named` are the special tokens by their names."""
    compiled = _environment().from_string(template)

    def render(messages: Sequence[Message], generation_prompt: bool) -> str:
        return compiled.render(messages=list(messages), add_generation_prompt=generation_prompt, **named)

    return render


def refuse_dice(template: str) -> None:
    """Raise BadInput for a template that rolls dice. One that cannot be parsed is left to its rendering."""
    try:
        found = dice(_environment().parse(template))
    except (TemplateError, RecursionError):
        return
    for name, line in found:
        raise BadInput(
            f"the chat template, line {line}: {name} is refused, because {ADVICE}. Fix: set format.chat_template to "
            f"one without it"
        )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _Generation(Extension):
    """`{% generation %}`, which marks what the policy says and writes nothing."""

    tags = {"generation"}  # noqa: RUF012, jinja2 has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> None:
    raise TemplateError(message)
