"""check, plan, schema: what a recipe says, before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import ask, checks, findings
from pipeline import plan as planning
from pipeline.cli.common import JsonOption, RecipeArgument, RegistryOption, SetOption, open_registry, print_json
from pipeline.cli.progress import Progress
from pipeline.cli.tables import plan_table, show
from pipeline.findings import refuse
from pipeline.launch import Launcher
from pipeline.plan import Planned
from pipeline.recipe import Model, Recipe, load
from pipeline.registry import Registry
from stages.errors import BadInput

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


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(check)
    app.command()(plan)
    app.command()(schema)


def check(recipe: RecipeArgument, overrides: SetOption = None, registry: RegistryOption = None) -> None:
    """Ask all that a run asks before its first step, and run nothing: settings, files, the problem and its rewards, prompts, data.

    It looks at the steps that a run would run. Ends with 3 where the best answer is not the best paid, as a run does. A few seconds, and none of an accelerator.
    """
    loaded = load(recipe, overrides or ())
    place = open_registry(registry, loaded)
    planned = planning.plan(loaded, place)
    looked_at = _looked_at(loaded, planned, place)
    names = [stage.name for stage in loaded.stages]
    print(f"{recipe}: good; {len(names)} stage{'s' if len(names) > 1 else ''}: {', '.join(names)}")
    print(looked_at)
    try:
        checks.refuse_unbuilt(loaded)
    except BadInput as error:
        print(f"but run will refuse it: {error}")


def _looked_at(recipe: Recipe, planned: list[Planned], place: Registry) -> str:
    """Ask, show what was found, and say what was looked at. Raises BadInput and Refused."""
    to_run = [one.step.name for one in planned if one.action == "run"]
    if not to_run:
        return f"looked at its settings and files; every step is in {place.url} already"
    there = _is_here(recipe.model)
    with Progress() as progress, Launcher(recipe.launch.threads, preload=False) as launcher:
        questions = ask.beforehand if there else ask.without_a_model
        for found in questions(planned, place, launcher, recipe.launch):
            for finding in findings.merged(found):
                progress.found(finding)
            refuse(found)
    if not there:
        return f"looked at its settings, files and rewards, not at prompts, data and rows: {recipe.model.hub} is not on this machine yet"
    later = [one.step.name for one in planned if one.action == "run" and ask.waits_for_data(one, planned)]
    waits = f"; not at the data of {', '.join(later)}, which are not made yet" if later else ""
    return f"looked at its settings and files, and at the problem, rewards, prompts and data of {', '.join(ask.checkable(planned))}{waits}"


def _is_here(model: Model) -> bool:
    """Whether the tokenizer of the base model can be read without fetching it."""
    if model.hub is None:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.hub, "tokenizer_config.json", revision=model.revision), str)


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
        print_json([planning.said(one) for one in planned])
    else:
        show(plan_table(planned))


def schema() -> None:
    """Print the JSON schema of a recipe; "part" says whether a field is identity or execution."""
    print_json(Recipe.model_json_schema())
