"""run, resume: a recipe from its first stage, a part of it, or on from where a run stopped."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from pipeline.cli.commands.recipe.plan import Fresh, From, Only, Until
from pipeline.cli.options import RecipeArgument, RegistryOption, SetOption, open_registry
from pipeline.cli.show.progress import Progress
from pipeline.cli.show.tables import run_table, show
from pipeline.cli.show.terminal import write
from pipeline.errors import RunInterrupted, Terminated
from pipeline.plan import plan as planning
from pipeline.recipe import checks
from pipeline.recipe.recipe import Recipe, is_text_of, load, parse
from pipeline.registry import Registry, runs
from pipeline.results.summary import summarise
from pipeline.run.execute import execute
from stages.runtime import signals

NoPrefect = Annotated[bool, typer.Option("--no-prefect", help="Run the same steps without a Prefect server.")]


ENDINGS = signals.ASKED_BY_MACHINES
"""A closed terminal ends a run as SIGTERM does: what can be saved is saved."""


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    registry: RegistryOption = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    fresh: Fresh = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Run a recipe; what is done already is reused."""
    loaded = load(recipe, overrides or ())
    checks.check(loaded)
    place = open_registry(registry, loaded)
    selection = planning.Selection(only, start, until)
    if fresh:
        loaded = planning.freshen(loaded, place, fresh, selection)
        replicate = next(stage.replicate for stage in loaded.stages if stage.name == fresh)
        write(f"{fresh}: replicate {replicate}; later runs use it with --set stages.{fresh}.replicate={replicate}")
    before = runs.unfinished(place, loaded.name, lambda text: is_text_of(text, loaded), selection._asdict())
    _run(loaded, place, selection, not no_prefect, before)


def resume(
    run: Annotated[str, typer.Argument(help="A run that was stopped, failed or killed.", show_default=False)],
    overrides: SetOption = None,
    registry: RegistryOption = None,
    no_prefect: NoPrefect = False,
) -> None:
    """Go on with a run where it was, as a new run that names it. Relative paths count from the directory that it was
    started in."""
    place = open_registry(registry)
    loaded = parse(runs.recipe_of(place, run), f"recipe.yaml of {run}", overrides or ())
    remembered = runs.planned(place, run)
    if (directory := Path(remembered.get("directory", "."))).is_dir():
        os.chdir(directory)
    checks.check(loaded)
    _run(loaded, place, planning.Selection(**remembered.get("selection", {})), not no_prefect, run)


def _run(
    recipe: Recipe, place: Registry, selection: planning.Selection, use_prefect: bool, resumes: str | None
) -> None:
    """Plan, run, report."""
    planned = planning.plan(recipe, place, selection)
    if resumes:
        write(f"continues run {resumes}, which is {runs.state(place, resumes)}")
    _listen()
    try:
        with Progress() as progress:
            id = execute(recipe, planned, place, progress, use_prefect, selection, resumes)
    except KeyboardInterrupt:
        # typer would end without a line
        raise RunInterrupted("interrupted; run the same command to go on with what is done") from None
    _report(place, id)


def _listen() -> None:
    """Let each of ENDINGS end the run, but for one that is ignored already: nohup means to outlive a terminal."""
    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    for other in ENDINGS:
        signal.signal(other, signal.SIG_IGN)  # once is enough; what follows must not be cut short
    raise Terminated


def _report(registry: Registry, run: str) -> None:
    show(run_table(summarise(registry, run)))
    write("scores are x 100, on held-out rows; mean of the samples with a 95 % interval over rows")
    write(f"run {run} in {registry.url}: switchback show {run} --registry {shlex.quote(registry.url)}")
