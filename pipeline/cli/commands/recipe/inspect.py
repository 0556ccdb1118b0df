"""inspect, probe: what a recipe would train on and how its prompts do, before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import (
    JsonOption,
    RecipeArgument,
    RegistryOption,
    SetOption,
    open_plan,
    print_json,
)
from pipeline.cli.show.loss_map import show_map
from pipeline.launch.local import Launcher
from pipeline.plan.plan import Planned
from pipeline.run import inspections
from stages.errors import BadInput
from stages.kinds import STAGES

Stage = Annotated[str, typer.Option("--stage", metavar="STAGE", help="An sft stage.", show_default=False)]
Row = Annotated[int, typer.Option("--row", min=0, help="Which of its rows, from 0.")]


def inspect(
    recipe: RecipeArgument,
    stage: Stage,
    row: Row = 0,
    overrides: SetOption = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Show what every token of a row weighs in an sft stage's loss."""
    _, place, planned = open_plan(recipe, overrides, registry)
    one = _named(planned, stage)
    with Launcher(preload=False) as launcher:
        found = inspections.loss_map(one, planned, row, place, launcher)
    if json:
        print_json({"tokens": found["tokens"]})
    else:
        show_map(stage, row, found)


def _named(planned: list[Planned], stage: str) -> Planned:
    if found := next((one for one in planned if one.step.name == stage and not one.step.evaluates), None):
        return found
    names = [one.step.name for one in planned if STAGES[one.step.kind].weighs_tokens]
    raise BadInput(f"no stage is named {stage}; the sft stages are {', '.join(names) or 'none'}")
