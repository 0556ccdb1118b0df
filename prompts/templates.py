"""The user template of a prompt: jinja2 in a sandbox, which makes the same text of the same row each time.

text -> a compiled template. Whatever differs from one rendering to the next is not there (the filter `random`, the
function `lipsum`) or refused when it is written (the address of an object). A template is a text on its own, so it
includes, imports and extends none. Nothing is computed while a template is compiled."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateRuntimeError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

FILTER, FUNCTION = "random", "lipsum"
"""What jinja2 has that rolls dice."""
OTHER_TEMPLATES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
ADDRESS = re.compile(r" at 0x[0-9a-f]+>")
PLAIN = (str, int, float, type(None), Undefined)
ADVICE = "it makes another prompt each time"


@lru_cache(maxsize=16)
def compiled(text: str) -> Template:
    """The template of a text. Raises TemplateSyntaxError where it is none, or where it is refused, and whatever
    compiling a text that is nested too deeply raises."""
    environment = _environment()
    tree = environment.parse(text)
    for name, line in dice(tree):
        raise TemplateSyntaxError(f"{name} is refused, because {ADVICE}", line)
    for node in tree.find_all(OTHER_TEMPLATES):
        raise TemplateSyntaxError("a prompt includes no other template; write its text out", node.lineno)
    return environment.from_string(tree)


def dice(tree: nodes.Template) -> list[tuple[str, int]]:
    """(name, line) of what differs from one rendering to the next: `random`, as a filter or by its name in `map`, and
    `lipsum`."""
    filters = [(node.name, node) for node in tree.find_all(nodes.Filter)]
    mapped = [(arg, node) for name, node in filters if name == "map" for arg in node.args[:1]]
    named = [(arg.value, node) for arg, node in mapped if isinstance(arg, nodes.Const)]
    functions = [(node.name, node) for node in tree.find_all(nodes.Name)]
    found = [(FILTER, node) for name, node in [*filters, *named] if name == FILTER]
    return [(name, node.lineno) for name, node in [*found, *((n, node) for n, node in functions if n == FUNCTION)]]


def _environment() -> SandboxedEnvironment:
    """Without optimiser and with a finalize that wants the context, or constants would be computed by the compiler."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, optimized=False, finalize=_written
    )
    del environment.filters[FILTER], environment.globals[FUNCTION]
    return environment


@pass_context
def _written(context: Context, value: Any) -> Any:
    """The value of an expression that is written. Raises TemplateRuntimeError for one that is named by its address."""
    if not isinstance(value, PLAIN) and ADDRESS.search(str(value)):
        raise TemplateRuntimeError(f"it writes a {type(value).__name__}, and {ADVICE}; call it, or use | list")
    return value
