"""A run: plan, then step after step, with or without Prefect, and every step remembered.

`run` is what `switchback run` calls. It owns what lives as long as the run does: the launcher, and a Prefect server of its own where one is needed.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from pipeline.errors import NotComparable
from pipeline.flows.server import api_url, own_server
from pipeline.launch.local import Launcher
from pipeline.plan.plan import ALL, Planned, Selection, said
from pipeline.plan.steps import Step
from pipeline.recipe import recipe as recipes
from pipeline.recipe.recipe import Recipe
from pipeline.registry import Artifact, Registry, runs
from pipeline.registry.workdir import work_root
from pipeline.results import findings
from pipeline.results.evaluations import difference
from pipeline.results.findings import refuse
from pipeline.run import inspections
from pipeline.run.mirror import open_mirror
from pipeline.run.observer import Observer
from pipeline.run.step import run_step
from stages.errors import BadInput
from stages.job import Finding, read_evaluation
from stages.stage import BASE


def run(
    recipe: Recipe,
    planned: list[Planned],
    registry: Registry,
    observer: Observer,
    use_prefect: bool,
    selection: Selection = ALL,
    resumes: str | None = None,
) -> str:
    """Run the plan, of which `selection` was asked for; returns the run's id. Raises StageFailed, BadInput or Refused; the run's last event says how it ended,
    whatever it was. `resumes` is the run that this one goes on from."""
    remembered = {
        "base": planned[0].step.inputs["policy"].source,
        "steps": [said(one) for one in planned],
        "selection": selection._asdict(),
        "directory": str(Path.cwd()),
    }
    id = runs.start(registry, recipe.name, recipes.dump(recipe), remembered, resumes)
    try:
        _conduct(id, recipe, planned, registry, observer, use_prefect)
    except BaseException as error:
        state = "failed" if isinstance(error, Exception) else "stopped"
        runs.record(registry, id, state, message=str(error) or type(error).__name__)
        raise
    runs.record(registry, id, "done")
    return id


def _conduct(
    id: str, recipe: Recipe, planned: list[Planned], registry: Registry, observer: Observer, use_prefect: bool
) -> None:
    """Step after step; what the run has held is let go when all are done. A run that ends in another way holds on, to be resumed."""
    made: dict[str, Artifact] = {}
    base = _held_base(planned[0], registry, id)
    mirror = open_mirror(recipe.work.mirror)
    to_run = any(one.action == "run" for one in planned)
    with ExitStack() as stack:
        launcher = stack.enter_context(Launcher(recipe.launch.threads))

        def report(found: list[Finding]) -> None:
            """Show what was found and remember it. Raises Refused for what nothing is to be trained on."""
            for finding in findings.merged(found):
                observer.found(finding)
            if found:
                runs.record(registry, id, "findings", findings=[finding.model_dump(mode="json") for finding in found])
            refuse(found)

        def do(one: Planned) -> tuple[Artifact, bool] | None:
            """What happens at a step; the only thing that a conductor calls."""
            if one.action == "skip":
                observer.skipped(one.step)
                return None
            if one.action == "run" and inspections.waits_for_data(one, planned):
                now = [other.model_copy(update={"artifact": made.get(other.step.name)}) for other in planned]
                report(inspections.preflight(now, [one.step.name], registry, launcher, recipe.launch))
            artifact, reused = run_step(one, made, registry, launcher, recipe.launch, observer, id, mirror)
            made[one.step.name] = artifact
            seconds = 0.0 if reused else artifact.provenance.get("seconds", 0.0)
            runs.record(registry, id, "step", step=one.step.name, artifact=artifact.id, reused=reused, seconds=seconds)
            if one.step.evaluates and not reused:
                _tell(one.step, planned, made, registry, observer)
            return artifact, reused

        with_prefect = use_prefect and bool(to_run or api_url())
        if to_run:
            launcher.warm_up()  # its imports and the server's start go side by side
        if with_prefect:
            stack.enter_context(own_server(work_root(registry) / "prefect"))
        for found in inspections.beforehand(planned, registry, launcher, recipe.launch):
            report(found)
        if with_prefect:
            from pipeline.flows.flow import conduct

            conduct(id, planned, do)
        else:
            for one in planned:
                do(one)
    for artifact in (*base, *made.values()):
        registry.release(artifact.id, id)


def _tell(
    step: Step, planned: list[Planned], made: dict[str, Artifact], registry: Registry, observer: Observer
) -> None:
    """What an evaluation found, beside that of the policy that its stage started from."""
    found = read_evaluation(registry.path(made[step.name], "held_out"))
    stage = next((one.step for one in planned if one.step.name == step.inputs["policy"].step), None)
    before = (stage.inputs["policy"].step or BASE) if stage else ""
    gain = None
    if other := made.get(f"{before}.evaluate"):
        try:
            gain = difference(registry, made[step.name], other, "held_out")
        except (BadInput, NotComparable) as error:
            observer.said(step, f"not compared with {before}: {error}")
    observer.evaluated(step, found, before, gain)


def _held_base(first: Planned, registry: Registry, run: str) -> list[Artifact]:
    """The base model, where it is an artifact, held by the run. Raises BadInput when it is void."""
    base = first.step.inputs["policy"].artifact
    if base is None:
        return []
    artifact = registry.open(base)
    if not registry.hold(artifact, run):
        raise BadInput(f"model.artifact: {base} is void; choose another, or run its recipe to make it again")
    return [artifact]
