"""ls, verify: what is in the registry, and whether it is still whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.tables import print_artifacts
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import current
from pipeline.registry.verify import Verified, verify_ids

Ids = Annotated[list[str] | None, typer.Argument(help="Artifacts or aliases. Default: all.", show_default=False)]


def ls(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List artifacts, oldest first; one whose manifest cannot be used is named on stderr."""
    place = open_registry(registry)
    found = place.artifacts()
    if json:
        print_json([_listed(place, artifact) for artifact in found])
    else:
        print_artifacts(place, found)


def verify(ids: Ids = None, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Hash every file of artifacts again; exit 1 when anything is not what was published, say what that reaches, and
    let such steps be made again."""
    place = open_registry(registry)
    place.must_exist()
    found = verify_ids(place, [_behind(place, id) for id in ids] if ids else None)
    damaged = [one for one in found if one.problems]
    if json:
        print_json([_verified(one) for one in found])
    else:
        lines = [line for one in damaged for line in (*one.problems, _reach(one))]
        print("\n".join(lines or [f"{len(found)} artifacts are whole"]))
    if damaged:
        raise typer.Exit(1)


def _behind(registry: Registry, id: str) -> str:
    """The artifact that an alias points at; an id as it is, since even one whose manifest is broken can be verified."""
    move = current(registry, id)
    return move.artifact if move and move.artifact else id


def _listed(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    path = registry.location(artifact)
    what = {"id": artifact.id, "stage": artifact.stage, "kind": artifact.kind}
    return {**what, "path": path, "created": artifact.created, "size": artifact.size}


def _verified(one: Verified) -> dict[str, Any]:
    return {
        "id": one.id,
        "ok": not one.problems,
        "problems": one.problems,
        "reaches": one.reaches.model_dump(mode="json"),
    }


def _reach(one: Verified) -> str:
    made = ", ".join(one.reaches.artifacts) or "no other artifact"
    aliases = f"; aliases: {', '.join(one.reaches.aliases)}" if one.reaches.aliases else ""
    return f"{one.id} reaches {made}{aliases}"
