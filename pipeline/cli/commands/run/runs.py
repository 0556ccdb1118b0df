"""runs, show: the runs of a registry, and their results."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show import tables
from pipeline.cli.show.terminal import write
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
    newest_first = all_runs(open_registry(registry))
    if json:
        print_json([run.model_dump() for run in newest_first])
    else:
        tables.show(tables.runs_table(newest_first))


def show(id: Id = None, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Show a run stage by stage, or an artifact."""
    place = open_registry(registry)
    if id is None:
        _show_run(place, _newest(place), json)
        return
    artifact = look_up(place, id)
    if artifact is not None:
        _show_artifact(place, artifact, json)
    else:
        refuse_stage(place, id)
        _show_run(place, id, json)


def _show_run(registry: Registry, run: str, as_json_text: bool) -> None:
    summary = summarise(registry, run)
    if as_json_text:
        print_json(as_json(summary))
    else:
        tables.show(tables.run_table(summary))
        write(f"run {run}: {summary.state}; in {registry.url}; scores are x 100, on held-out rows")


def _show_artifact(registry: Registry, artifact: Artifact, as_json_text: bool) -> None:
    if as_json_text:
        print_json({**artifact.model_dump(mode="json"), "path": registry.location(artifact)})
    else:
        tables.show(tables.artifact_table(registry, artifact))


def _newest(registry: Registry) -> str:
    newest_first = all_runs(registry)
    if not newest_first:
        raise BadInput(f"there is no run in {registry.url}; switchback run makes one")
    return newest_first[0].run
