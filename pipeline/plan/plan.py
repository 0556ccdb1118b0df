"""The plan: steps + Registry -> for each whether it is reused or run, and why. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from pipeline.plan.base import base_of
from pipeline.plan.steps import Step, steps
from pipeline.recipe import checks
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.validation_errors import nearest
from pipeline.registry import Artifact, Registry
from pipeline.registry.keys import abbreviated, changes
from stages.config import Frozen
from stages.errors import BadInput
from stages.stage import BASE


class Planned(Frozen):
    """A step and what is to be done about it."""

    step: Step
    action: Literal["reuse", "run", "skip"]
    artifact: Artifact | None
    """What is reused."""
    why: str


class Selection(NamedTuple):
    """Which stages may be run; what they need must be there already."""

    only: str | None = None
    start: str | None = None
    """`--from`: this stage and all after it."""
    until: str | None = None
    """The last stage."""


ALL = Selection()


def plan(recipe: Recipe, registry: Registry, selection: Selection = ALL) -> list[Planned]:
    """What `run` would do. Raises BadInput for a recipe that does not hold together, or when a selected step needs one
    that is not there."""
    checks.check(recipe)
    chosen = _chosen(recipe, selection)
    artifacts = cache(registry.artifacts)  # read once a stage, and only when something has to be explained
    planned = [
        _decide(step, registry, artifacts, step.name.partition(".")[0] in chosen) for step in steps(recipe, registry)
    ]
    there = {one.step.name for one in planned if one.action != "skip"}
    for one in planned:
        missing = [ref.step for ref in one.step.inputs.values() if ref.step and ref.step not in there]
        if one.action == "run" and missing:
            raise BadInput(
                f"{one.step.name} reads {missing[0]}, which is neither in {registry.url} nor selected to run; run "
                f"{missing[0]} first"
            )
    return planned


def freshen(recipe: Recipe, registry: Registry, name: str, selection: Selection = ALL) -> Recipe:
    """The recipe with the stage's replicate raised to the first that the registry does not have. Raises BadInput for a
    stage that is unknown or not selected."""
    checks.check(recipe)
    _index(recipe, name)
    if name not in _chosen(recipe, selection):
        raise BadInput(f"--fresh {name}: {name} is not selected to run; select it too")
    base = base_of(recipe, registry)
    while True:
        stages = tuple(
            stage.model_copy(update={"replicate": stage.replicate + 1}) if stage.name == name else stage
            for stage in recipe.stages
        )
        recipe = recipe.model_copy(update={"stages": stages})
        step = next(step for step in steps(recipe, registry, base) if step.name == name)
        if registry.find(step.key) is None:
            return recipe


def described(one: Planned) -> dict[str, str | None]:
    """A planned step as `plan --json` and a run's plan.json give it."""
    step, artifact = one.step, one.artifact.id if one.artifact else None
    what = {"step": step.name, "kind": step.kind, "key": step.key}
    return {**what, "action": one.action, "artifact": artifact, "why": one.why}


def _chosen(recipe: Recipe, selection: Selection) -> set[str]:
    """Names of the stages that may run; `base` stands for its evaluation."""
    names = [BASE, *(stage.name for stage in recipe.stages)]
    if selection.only and (selection.start or selection.until):
        raise BadInput("--only names one stage; --from and --until name a range; give one or the other")
    if selection.only:
        return {names[_index(recipe, selection.only)]}
    first = _index(recipe, selection.start) if selection.start else 0
    last = _index(recipe, selection.until) if selection.until else len(names) - 1
    if first > last:
        raise BadInput(f"--from {selection.start} comes after --until {selection.until}; nothing is between them")
    return set(names[first : last + 1])


def _index(recipe: Recipe, name: str) -> int:
    names = [BASE, *(stage.name for stage in recipe.stages)]
    if name not in names[1:]:
        raise BadInput(f"no stage is named {name}{nearest(name, names[1:])}")
    return names.index(name)


def _decide(step: Step, registry: Registry, artifacts: Callable[[str], list[Artifact]], may_run: bool) -> Planned:
    if artifact := registry.find(step.key):
        return Planned(step=step, action="reuse", artifact=artifact, why=artifact.id)
    if not may_run:
        return Planned(step=step, action="skip", artifact=None, why="not selected")
    return Planned(step=step, action="run", artifact=None, why=reason(step, artifacts(step.name)))


def reason(step: Step, artifacts: Sequence[Artifact]) -> str:
    """Why a step is run: new, input changed, or which field changed from what to what against the nearest earlier
    artifact of the stage."""
    earlier = [artifact for artifact in artifacts if artifact.stage == step.name and artifact.kind == step.kind]
    if not earlier:
        return "new"
    diffs = [(changes(artifact.identity, step.identity), artifact) for artifact in reversed(earlier)]
    diff, closest = min(diffs, key=lambda pair: len(pair[0]))
    if not diff:
        return f"{closest.id} is there, but the registry no longer gives it for this key"
    return "; ".join(_changes(diff, step)) + f" (against {closest.id})"


def _changes(diff: dict[str, tuple[Any, Any]], step: Step) -> Iterator[str]:
    for field, (before, after) in diff.items():
        if field.startswith("inputs."):
            role = field.split(".")[1]
            yield (
                f"input changed: {role} ({step.inputs[role].source})" if role in step.inputs else f"input gone: {role}"
            )
        else:
            yield abbreviated(f"{field.removeprefix('config.')}: {before!r} -> {after!r}")
