"""export, push: a policy or data set leaves the registry, as a plain directory or to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.terminal import write
from pipeline.export import export as exports
from pipeline.export import push as pushes

Id = Annotated[
    str,
    typer.Argument(
        metavar="ID[:OUTPUT]",
        help="An artifact that holds a policy or data; harvest-1a2b3c4d:control is its control.",
        show_default=False,
    ),
]
Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Where to; must not exist, or be empty.", show_default=False)
]
Target = Annotated[str, typer.Argument(metavar="hf://ORG/NAME", help="A repository on the hub.", show_default=False)]
Public = Annotated[bool, typer.Option("--public", help="Let everybody read it. Default: private.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="A branch; made when it is not there. Default: main.", show_default=False),
]


def export(id: Id, directory: Directory, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Write a policy as a plain model directory with a model card, or data as a data set."""
    place = open_registry(registry)
    artifact, output = exports.named(place, id)
    done = exports.export(place, artifact, directory, output)
    if json:
        files = [str(file) for file in done.files]
        print_json(
            {"id": artifact.id, "output": output, "path": str(done.directory), "files": files, "size": done.size}
        )
    else:
        write(
            f"{exports.called(artifact, output)} is in {done.directory}: {len(done.files)} files, "
            f"{decimal(done.size)}; README.md is its card"
        )


def push(
    id: Id,
    target: Target,
    public: Public = False,
    revision: Revision = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Export to the Hugging Face hub as one commit. The token is HF_TOKEN's, or that of hf auth login."""
    place = open_registry(registry)
    artifact, output = exports.named(place, id)
    done = pushes.push(place, artifact, target, public, revision, output)
    if json:
        print_json({"id": artifact.id, "output": output, **done._asdict()})
    else:
        write(f"{exports.called(artifact, output)} is in {done.url} ({'private' if done.private else 'public'})")
