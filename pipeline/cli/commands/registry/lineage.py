"""lineage: what an artifact was made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.registry.aliases import resolve
from pipeline.registry.keys import abbreviated
from pipeline.registry.lineage import Ancestor, mermaid
from pipeline.registry.lineage import lineage as lineage_of
from stages.errors import printable

Id = Annotated[str, typer.Argument(help="An artifact.", show_default=False)]
Mermaid = Annotated[bool, typer.Option("--mermaid", help="Print a graph for mermaid.")]


def lineage(id: Id, registry: RegistryOption = None, json: JsonOption = False, as_mermaid: Mermaid = False) -> None:
    """Show what an artifact was made from, down to the base model and the data; what is gone or not what was read is
    said."""
    place = open_registry(registry)
    found = lineage_of(place, resolve(place, id))
    if json:
        print_json(found.model_dump(mode="json"))
    elif as_mermaid:
        print(mermaid(found))
    else:
        print("\n".join(_tree(found)))


def _tree(ancestor: Ancestor, first: str = "", rest: str = "") -> Iterator[str]:
    """A line a node; `first` is drawn before its own, `rest` before those below it."""
    role = f"{ancestor.role}: " if ancestor.role else ""
    what = printable(
        f"{role}{ancestor.id or abbreviated(ancestor.name)} ({ancestor.kind}, {_said(ancestor)} {ancestor.key[:12]})"
    )
    yield f"{first}{what}{f'; {printable(ancestor.note)}' if ancestor.note else ''}"
    for i, inner in enumerate(ancestor.inputs):
        last = i == len(ancestor.inputs) - 1
        yield from _tree(inner, rest + ("└── " if last else "├── "), rest + ("    " if last else "│   "))


def _said(ancestor: Ancestor) -> str:
    """What its key is the digest of."""
    return "key" if ancestor.id or ancestor.name.startswith("hf://") else "digest"
