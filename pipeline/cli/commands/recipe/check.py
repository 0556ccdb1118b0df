"""check: everything that a run asks before its first step, and no step is run."""

from __future__ import annotations

from pipeline.cli.options import RecipeArgument, RegistryOption, SetOption, open_registry
from pipeline.cli.show.progress import Progress
from pipeline.cli.show.terminal import write
from pipeline.launch.local import Launcher
from pipeline.plan import plan as planning
from pipeline.plan.plan import Planned
from pipeline.recipe.recipe import Model, Recipe, load
from pipeline.registry import Registry
from pipeline.results import findings
from pipeline.results.findings import refuse
from pipeline.run import inspections


def check(recipe: RecipeArgument, overrides: SetOption = None, registry: RegistryOption = None) -> None:
    """Ask all that a run asks before its first step, and run nothing: settings, files, the problem and its rewards,
    prompts, data.

    It looks at the steps that a run would run. Ends with 3 where the best answer is not the best paid, as a run does.
    A few seconds, and none of an accelerator."""
    loaded = load(recipe, overrides or ())
    place = open_registry(registry, loaded)
    planned = planning.plan(loaded, place)
    looked_at = _looked_at(loaded, planned, place)
    names = [stage.name for stage in loaded.stages]
    write(f"{recipe}: good; {len(names)} stage{'s' if len(names) > 1 else ''}: {', '.join(names)}")
    write(looked_at)


def _looked_at(recipe: Recipe, planned: list[Planned], place: Registry) -> str:
    """Ask, show what was found, and say what was looked at. Raises BadInput and Refused."""
    to_run = [one.step.name for one in planned if one.action == "run"]
    if not to_run:
        return f"looked at its settings and files; every step is in {place.url} already"
    there = _is_here(recipe.model)
    with Progress() as progress, Launcher(recipe.launch.threads, preload=False) as launcher:
        questions = inspections.beforehand if there else inspections.without_a_model
        for found in questions(planned, place, launcher, recipe.launch):
            for finding in findings.merged(found):
                progress.found(finding)
            refuse(found)
    if not there:
        return (
            f"looked at its settings, files and rewards, not at prompts, data and rows: {recipe.model.hub} is not "
            f"on this machine yet"
        )
    later = [one.step.name for one in planned if one.action == "run" and inspections.waits_for_data(one, planned)]
    waits = f"; not at the data of {', '.join(later)}, which are not made yet" if later else ""
    return (
        f"looked at its settings and files, and at the problem, rewards, prompts and data of "
        f"{', '.join(inspections.checkable(planned))}{waits}"
    )


def _is_here(model: Model) -> bool:
    """Whether the tokenizer of the base model can be read without fetching it."""
    if model.hub is None:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.hub, "tokenizer_config.json", revision=model.revision), str)
