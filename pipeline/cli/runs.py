"""runs, show: what was run, and what came of it."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.common import JsonOption, RegistryOption, open_registry, print_json, size
from pipeline.cli.tables import console, run_table, show as print_table, table
from pipeline.registry import Artifact, Registry
from pipeline.registry.runs import runs as all_runs
from pipeline.summary import as_json, summarise
from stages.job import BadInput


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(runs)
    app.command()(show)


def runs(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List runs, newest first."""
    found = all_runs(open_registry(registry))
    if json:
        return print_json([one.model_dump() for one in found])
    made = table("run", "recipe", "state", "started")
    for one in found:
        made.add_row(one.run, one.recipe, one.state, one.started[:19].replace("T", " "))
    print_table(made)


def show(
    id: Annotated[str | None, typer.Argument(help="A run or an artifact. Default: the newest run.", show_default=False)] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Show a run stage by stage, or an artifact."""
    place = open_registry(registry)
    if id and (artifact := place.get(id)):
        return _show_artifact(place, artifact, json)
    if id is None:
        newest = all_runs(place)[:1]
        if not newest:
            raise BadInput(f"there is no run in {place.root}; switchback run makes one")
        id = newest[0].run
    summary = summarise(place, id)
    if json:
        return print_json(as_json(summary))
    print_table(run_table(summary))
    print(f"run {summary.run}: {summary.state}; in {place.root}; scores are x 100, on held-out rows")


def _show_artifact(registry: Registry, artifact: Artifact, json: bool) -> None:
    if json:
        return print_json({**artifact.model_dump(mode="json"), "path": str(registry.path(artifact))})
    made = table("", "")
    made.add_row("id", artifact.id)
    made.add_row("kind", artifact.kind)
    made.add_row("path", str(registry.path(artifact)))
    made.add_row("created", artifact.created)
    made.add_row("size", f"{size(artifact.size)} in {len(artifact.files)} files")
    for role, source in artifact.inputs.items():
        made.add_row(role, source.id or source.name)
    for name, value in artifact.metrics.items():
        made.add_row(name, f"{value:.4g}")
    made.show_header = False
    console().print(made)
