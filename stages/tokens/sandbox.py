"""Chat templates without a tokenizer: compiled in the environment that transformers gives them.

The plan renders probes here, and a preflight looks at a template's source, both without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prompts.templates import ADVICE, dice
from stages.errors import BadInput
from stages.tokens.turns import Message, Render

CLOCK = "strftime_now"
"""transformers' function that writes the time."""
DIRECTIVE = re.compile(r"%[-_0^#]*\d*[EO]?(.?)", re.S)
DAYS = frozenset("aAbBCdDeFgGhjmntuUVwWxyY%")
"""Directives of strftime that say the same all day."""


def renderer(template: str, named: dict[str, str]) -> Render:
    """A template as a function; `named` are the special tokens by their names."""
    compiled = _environment().from_string(template)

    def render(messages: Sequence[Message], generation_prompt: bool) -> str:
        return compiled.render(messages=list(messages), add_generation_prompt=generation_prompt, **named)

    return render


def refuse_dice(template: str) -> None:
    """Raise BadInput for a template that rolls dice or writes the time of day. One that cannot be parsed is left to
    its rendering."""
    try:
        tree = _environment().parse(template)
        found = [*dice(tree), *_times(tree)]
    except (TemplateError, RecursionError):
        return
    for name, line in found:
        raise BadInput(
            f"the chat template, line {line}: {name} is refused, because {ADVICE}. Fix: set format.chat_template to "
            f"one without it"
        )


def _times(tree: nodes.Template) -> Iterator[tuple[str, int]]:
    """(name, line) of each strftime_now that may say more than the day. Whether it is defined may be asked."""
    asked = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    days = [call.node for call in tree.find_all(nodes.Call) if _says_the_day(call)]
    harmless = {id(node) for node in (*asked, *days)}
    for node in tree.find_all(nodes.Name):
        if node.name == CLOCK and node.ctx == "load" and id(node) not in harmless:
            yield f"{CLOCK} with more than a day, or a format that is not written out,", node.lineno


def _says_the_day(call: nodes.Call) -> bool:
    """Whether its one argument is a format that is written out, and has no directive finer than a day."""
    args = [*call.args, *(pair.value for pair in call.kwargs)]
    written = args[0].value if len(args) == 1 and isinstance(args[0], nodes.Const) else None
    return isinstance(written, str) and DAYS.issuperset(DIRECTIVE.findall(written))


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
