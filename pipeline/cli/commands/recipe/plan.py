"""check, plan, schema: what a recipe says, before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RecipeArgument, RegistryOption, SetOption, open_registry, print_json
from pipeline.cli.show.tables import plan_table, show
from pipeline.plan import plan as planning
from pipeline.recipe.recipe import Recipe, load

Only = Annotated[
    str | None, typer.Option("--only", metavar="STAGE", help="Only this stage and its evaluation.", show_default=False)
]
From = Annotated[
    str | None, typer.Option("--from", metavar="STAGE", help="This stage and all after it.", show_default=False)
]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Up to this stage.", show_default=False)]
Fresh = Annotated[
    str | None,
    typer.Option("--fresh", metavar="STAGE", help="Make this stage again, as a new replicate.", show_default=False),
]


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    registry: RegistryOption = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    fresh: Fresh = None,
    json: JsonOption = False,
) -> None:
    """Show for each step whether it is reused or run, and why."""
    loaded = load(recipe, overrides or ())
    place = open_registry(registry, loaded)
    selection = planning.Selection(only, start, until)
    if fresh:
        loaded = planning.freshen(loaded, place, fresh, selection)
    planned = planning.plan(loaded, place, selection)
    if json:
        print_json([planning.described(one) for one in planned])
    else:
        show(plan_table(planned))


def schema() -> None:
    """Print the JSON schema of a recipe; "part" says whether a field is identity or execution."""
    print_json(Recipe.model_json_schema())
