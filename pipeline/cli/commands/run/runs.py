"""runs, show: what was run, and what came of it."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show import tables
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import look_up, refuse_stage
from pipeline.registry.runs import runs as all_runs
from pipeline.results.summary import as_json, summarise
from stages.errors import BadInput

Id = Annotated[
    str | None, typer.Argument(help="A run, an artifact or an alias. Default: the newest run.", show_default=False)
]


def runs(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List runs, newest first."""
    found = all_runs(open_registry(registry))
    if json:
        print_json([one.model_dump() for one in found])
    else:
        tables.show(tables.runs_table(found))


def show(id: Id = None, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Show a run stage by stage, or an artifact."""
    place = open_registry(registry)
    if id is not None and (artifact := look_up(place, id)):
        _show_artifact(place, artifact, json)
    elif id is None:
        _show_run(place, _newest(place), json)
    else:
        refuse_stage(place, id)
        _show_run(place, id, json)


def _show_run(registry: Registry, run: str, json: bool) -> None:
    summary = summarise(registry, run)
    if json:
        print_json(as_json(summary))
    else:
        tables.show(tables.run_table(summary))
        print(f"run {run}: {summary.state}; in {registry.url}; scores are x 100, on held-out rows")


def _show_artifact(registry: Registry, artifact: Artifact, json: bool) -> None:
    if json:
        print_json({**artifact.model_dump(mode="json"), "path": registry.location(artifact)})
    else:
        tables.show(tables.artifact_table(registry, artifact))


def _newest(registry: Registry) -> str:
    if found := all_runs(registry):
        return found[0].run
    raise BadInput(f"there is no run in {registry.url}; switchback run makes one")
