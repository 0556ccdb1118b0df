"""ls, verify: list the artifacts of a registry, and check their bytes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.tables import print_artifacts
from pipeline.cli.show.terminal import write
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import current
from pipeline.registry.verify import Verified, verify_ids

Ids = Annotated[list[str] | None, typer.Argument(help="Artifacts or aliases. Default: all.", show_default=False)]


def ls(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List artifacts, oldest first; one whose manifest cannot be used is named on stderr."""
    place = open_registry(registry)
    artifacts = place.artifacts()
    if json:
        print_json([_listed(place, artifact) for artifact in artifacts])
    else:
        print_artifacts(place, artifacts)


def verify(ids: Ids = None, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Hash every file of artifacts again; exit 1 when anything is not what was published, say what that reaches, and
    let such steps be made again."""
    place = open_registry(registry)
    place.must_exist()
    results = verify_ids(place, [_target(place, name) for name in ids] if ids else None)
    damaged = [result for result in results if result.problems]
    if json:
        print_json([_verified(result) for result in results])
    else:
        lines = [line for result in damaged for line in (*result.problems, _reach(result))]
        write("\n".join(lines or [f"{len(results)} artifacts are whole"]))
    if damaged:
        raise typer.Exit(1)


def _target(registry: Registry, id_or_alias: str) -> str:
    """The target of an alias; an id unchanged, since an artifact with a broken manifest can be verified too."""
    move = current(registry, id_or_alias)
    return move.artifact if move and move.artifact else id_or_alias


def _listed(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    path = registry.location(artifact)
    return {
        "id": artifact.id,
        "stage": artifact.stage,
        "kind": artifact.kind,
        "path": path,
        "created": artifact.created,
        "size": artifact.size,
    }


def _verified(result: Verified) -> dict[str, Any]:
    return {
        "id": result.id,
        "ok": not result.problems,
        "problems": result.problems,
        "reaches": result.reaches.model_dump(mode="json"),
    }


def _reach(result: Verified) -> str:
    descendants = ", ".join(result.reaches.artifacts) or "no other artifact"
    text = f"{result.id} reaches {descendants}"
    if result.reaches.aliases:
        text += f"; aliases: {', '.join(result.reaches.aliases)}"
    return text
