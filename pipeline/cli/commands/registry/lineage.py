"""lineage: the inputs of an artifact, as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.terminal import write
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
    top = lineage_of(place, resolve(place, id))
    if json:
        print_json(top.model_dump(mode="json"))
    elif as_mermaid:
        write(mermaid(top))
    else:
        write("\n".join(_tree(top)))


def _tree(ancestor: Ancestor, first: str = "", rest: str = "") -> Iterator[str]:
    """A line per node; `first` is drawn before its own line, `rest` before the lines below it."""
    role = f"{ancestor.role}: " if ancestor.role else ""
    name = ancestor.id or abbreviated(ancestor.name)
    node = printable(f"{role}{name} ({ancestor.kind}, {_kind_of_key(ancestor)} {ancestor.key[:12]})")
    note = f"; {printable(ancestor.note)}" if ancestor.note else ""
    yield f"{first}{node}{note}"
    for i, inner in enumerate(ancestor.inputs):
        if i < len(ancestor.inputs) - 1:
            yield from _tree(inner, f"{rest}├── ", f"{rest}│   ")
        else:
            yield from _tree(inner, f"{rest}└── ", f"{rest}    ")


def _kind_of_key(ancestor: Ancestor) -> str:
    """`key` for an artifact or a hub model, `digest` for files."""
    return "key" if ancestor.id or ancestor.name.startswith("hf://") else "digest"
