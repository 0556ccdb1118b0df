"""What `switchback run` calls: a plan is run step after step, with or without Prefect.

Preflight and audits come first, so that a recipe that cannot work trains nothing. The steps are made here, in the main
thread, so that Ctrl-C and SIGTERM reach them. Prefect hears what became of each, and decides nothing."""

from __future__ import annotations

from contextlib import ExitStack

from pipeline.errors import NotComparable, Refused
from pipeline.flows.report import flow_process
from pipeline.flows.server import api_url
from pipeline.plan.plan import ALL, Planned, Selection
from pipeline.plan.steps import Step
from pipeline.recipe.recipe import Recipe
from pipeline.registry import Registry
from pipeline.registry.workdir import prefect_home
from pipeline.results.evaluations import difference
from pipeline.run import hub, inspections
from pipeline.run.observer import Observer
from pipeline.run.run import Run
from pipeline.run.step import Made, make
from stages.errors import BadInput
from stages.job import read_evaluation
from stages.stage import BASE


def execute(
    recipe: Recipe,
    planned: list[Planned],
    registry: Registry,
    observer: Observer,
    use_prefect: bool,
    selection: Selection = ALL,
    resumes: str | None = None,
) -> str:
    """Run the plan, of which `selection` was requested; returns the run's id. `resumes` is the run that this one
    continues.

    Raises StageFailed, BadInput or Refused. The run's last event says how it ended, whatever was raised.
    """
    with Run(recipe, planned, registry, observer, selection, resumes) as run, ExitStack() as stack:
        to_run = any(one.action == "run" for one in planned)
        with_prefect = use_prefect and bool(to_run or api_url())
        if to_run:
            hub.refuse_unreachable(recipe.model)
            run.launcher.warm_up()  # its imports and the server's start go side by side
        flow = None
        if with_prefect:
            flow = stack.enter_context(flow_process(prefect_home(registry), run.id, observer.noted))
        for found in inspections.beforehand(planned, registry, run.launcher, run.execution):
            run.report(found)
        if flow:
            flow.begin(run.id, planned)
        for one in planned:
            made = run_step(one, run)
            if flow:
                flow.became(*shown_as(made))
    return run.id


def run_step(one: Planned, run: Run) -> Made | None:
    """Make or reuse a step's artifact, and record it; None for a step that was not selected."""
    if one.action == "skip":
        run.observer.skipped(one.step)
        return None
    if one.action == "run" and inspections.waits_for_data(one, run.planned):
        now = [other.model_copy(update={"artifact": run.made.get(other.step.name)}) for other in run.planned]
        run.report(inspections.preflight(now, [one.step.name], run.registry, run.launcher, run.execution))
    made = make(one, run)
    run.made[one.step.name] = made.artifact
    seconds = 0.0 if made.reused else made.artifact.provenance.get("seconds", 0.0)
    run.record("step", step=one.step.name, artifact=made.artifact.id, reused=made.reused, seconds=seconds)
    if one.step.evaluates:
        if not made.reused:
            _show_evaluation(one.step, run)
        _refuse_without_scores(one.step, run)
    return made


def shown_as(made: Made | None) -> tuple[str, str]:
    """The name and the text of a step's state in Prefect."""
    if made is None:
        return "NotSelected", ""
    return "Reused" if made.reused else "Completed", made.artifact.id


def _refuse_without_scores(step: Step, run: Run) -> None:
    """Raise Refused where no row of a split has a score: what is trained could never be measured."""
    for split in run.made[step.name].outputs:
        scores = read_evaluation(run.registry.path(run.made[step.name], split))
        if scores.mean is None:
            raise Refused(
                f"{step.name}: none of the {scores.rows} {split} rows has a score (no reward applies to them, or their "
                f"score is None), so its mean is '-' and training could not be measured; look at the rewards and the "
                f"reference answers with switchback audit"
            )


def _show_evaluation(step: Step, run: Run) -> None:
    """An evaluation's scores, and the gain over the policy that its stage started from."""
    scores = read_evaluation(run.registry.path(run.made[step.name], "held_out"))
    stage = next((one.step for one in run.planned if one.step.name == step.inputs["policy"].step), None)
    before = (stage.inputs["policy"].step or BASE) if stage else ""
    gain = None
    if other := run.made.get(f"{before}.evaluate"):
        try:
            gain = difference(run.registry, run.made[step.name], other, "held_out")
        except (BadInput, NotComparable) as error:
            run.observer.said(step, f"not compared with {before}: {error}")
    run.observer.evaluated(step, scores, before, gain)
