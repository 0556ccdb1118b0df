"""ls, lineage, verify: what is in the registry, where it comes from, and whether it is still whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.tree import Tree

from pipeline.cli.common import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.tables import artifacts_table, console, show
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import resolve
from pipeline.registry.lineage import Ancestor
from pipeline.registry.lineage import lineage as lineage_of
from pipeline.registry.verify import verify as problems_of

Id = Annotated[str, typer.Argument(help="An artifact, or an alias.", show_default=False)]
Ids = Annotated[list[str] | None, typer.Argument(help="Artifacts or aliases. Default: all.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(ls)
    app.command()(lineage)
    app.command()(verify)


def ls(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List artifacts, oldest first."""
    place = open_registry(registry)
    found = place.artifacts()
    if json:
        print_json([_listed(place, artifact) for artifact in found])
    else:
        show(artifacts_table(place, found))


def lineage(id: Id, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Show what an artifact was made from, down to the base model."""
    place = open_registry(registry)
    found = lineage_of(place, resolve(place, id))
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        console().print(_tree(found))


def verify(ids: Ids = None, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Hash every file of artifacts again; exit 1 when anything is not what was published, and let such steps be made again."""
    place = open_registry(registry)
    artifacts = [resolve(place, id) for id in ids] if ids else place.artifacts()
    wrong = {artifact.id: problems_of(place, artifact) for artifact in artifacts}
    for artifact in artifacts:
        if wrong[artifact.id]:
            place.void(artifact, "failed verification")
    lines = [line for found in wrong.values() for line in found]
    if json:
        print_json([{"id": id, "ok": not found, "problems": found} for id, found in wrong.items()])
    else:
        print("\n".join(lines or [f"{len(artifacts)} artifacts are whole"]))
    if lines:
        raise typer.Exit(1)


def _listed(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    path = registry.location(artifact)
    what = {"id": artifact.id, "stage": artifact.stage, "kind": artifact.kind}
    return {**what, "path": path, "created": artifact.created, "size": artifact.size}


def _tree(ancestor: Ancestor, into: Tree | None = None) -> Tree:
    label = f"{f'{ancestor.role}: ' if ancestor.role else ''}{ancestor.id or ancestor.name} ({ancestor.kind}, key {ancestor.key[:12]})"
    node = into.add(escape(label)) if into else Tree(escape(label))
    for inner in ancestor.inputs:
        _tree(inner, node)
    return node
