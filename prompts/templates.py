"""The user template of a prompt: jinja2 in a sandbox, which makes the same text of the same row each time.

text -> a compiled template. Whatever differs from one rendering to the next is not there (the filter `random`, the
function `lipsum`) or refused when it is written (the address of an object). A template is a text on its own, so it
includes, imports and extends none. Nothing is computed while a template is compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateRuntimeError, TemplateSyntaxError, nodes, pass_context
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment

FILTER, FUNCTION, APPLIES = "random", "lipsum", "map"
"""What jinja2 has that rolls dice, and its filter that applies a filter by name."""
HIDDEN = "a map whose filter is not written out"
OTHER_TEMPLATES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
ADDRESS = re.compile(r"0[xX](?:[0-9a-fA-F]{8,}|(?<= at 0x)[0-9a-f]+(?=>))")
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
    """(name, line) of what differs from one rendering to the next: `random`, as a filter or by its name in `map`, a
    `map` whose filter is not written out, and `lipsum`."""
    filters = [*tree.find_all(nodes.Filter)]
    applied = [(name, node) for node in filters for name in (node.name, *_applied(node)) if name in (FILTER, HIDDEN)]
    functions = [(node.name, node) for node in tree.find_all(nodes.Name) if node.name == FUNCTION]
    return [(name, node.lineno) for name, node in [*applied, *functions]]


def _applied(node: nodes.Filter) -> Iterator[str]:
    """The filters that a `map` applies, which may be `map` itself: their names, or HIDDEN."""
    name, args = node.name, list(node.args)
    while name == APPLIES and (args or node.dyn_args is not None):
        first = args.pop(0) if args else node.dyn_args
        name = first.value if isinstance(first, nodes.Const) and isinstance(first.value, str) else HIDDEN
        yield name


def address(text: str, *sources: Any) -> str | None:
    """The first address of an object that stands in a text; None without one. `sources` are what the text was made of
    (the template, the row, the messages): digits that stand there are no address."""
    found = [match[0] for match in ADDRESS.finditer(text)]
    if not found:
        return None
    known = json.dumps(sources, default=lambda other: "", skipkeys=True).lower()
    return next((token for token in found if token[2:].lower() not in known), None)


def _environment() -> SandboxedEnvironment:
    """Without optimiser and with a finalize that wants the context, or constants would be computed by the compiler."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, optimized=False, finalize=_as_it_is
    )
    del environment.filters[FILTER], environment.globals[FUNCTION]
    environment.filters.update({name: _nameless(filter) for name, filter in environment.filters.items()})
    return environment


@pass_context
def _as_it_is(context: Context, value: Any) -> Any:
    return value


class _Items:
    """What a filter such as `map` makes: items that can be taken once, and that are not text.

    The text of jinja2's own generator is its address. A list in its place would say more than the generator did where
    a template goes through it twice."""

    __slots__ = ("_items",)

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)

    def __repr__(self) -> str:
        raise TemplateRuntimeError(f"it writes a generator as text, and {ADVICE}; use | list")


def _nameless(filter: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, whose generators and other iterators have no address to write."""

    @wraps(filter)
    def applied(*args: Any, **kwargs: Any) -> Any:
        made = filter(*args, **kwargs)
        return _Items(made) if isinstance(made, Iterator) and not isinstance(made, _Items | LoopContext) else made

    return applied
