"""Questions: jobs whose answer is shown and not published. They look at a recipe's steps, and at what of them is there
already.

a step -> its job, with the nearest policy that is there in the place of one that is not made yet -> an answer, as JSON
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageFailed
from pipeline.launch.local import Launcher, OnMetrics
from pipeline.plan.plan import Planned
from pipeline.plan.steps import Step
from pipeline.registry import Artifact, Registry
from pipeline.run.job import job_of, place_of
from stages.errors import BadInput
from stages.inspections import probe as probe_job
from stages.inspections import rows as rows_job
from stages.inspections import score as score_job
from stages.job import Execution, Finding, Job
from stages.kinds import STAGES
from stages.rewards.audit import audit as audit_job
from stages.rewards.compose import Rewards
from stages.tokens import loss_map as loss_map_file


def preflight(
    planned: Sequence[Planned], names: Sequence[str], registry: Registry, launcher: Launcher, execution: Execution
) -> list[Finding]:
    """What is known about steps before they run. Raises BadInput for what cannot work."""
    looked_at = [one for one in planned if one.step.name in names]
    jobs = [stand_in(one, planned, registry, execution) for one in looked_at]
    there = [one.step.name for one in looked_at if _is_there(one.step.inputs["policy"].step, planned)]
    config = {"jobs": [job.model_dump(mode="json") for job in jobs], "policies_there": there}
    with _question("preflight", config, jobs[0], {}) as job:
        return list(launcher.launch(job).findings)


def checkable(planned: Sequence[Planned]) -> list[str]:
    """Steps that a preflight looks at before anything runs: all that train or sample, and one evaluation for all,
    which have the same rows."""
    to_run = [one.step for one in planned if one.action == "run"]
    evaluations = [step.name for step in to_run if step.evaluates]
    return [*evaluations[:1], *(step.name for step in to_run if not step.evaluates)]


def beforehand(
    planned: Sequence[Planned], registry: Registry, launcher: Launcher, execution: Execution
) -> Iterator[list[Finding]]:
    """All that a run asks before its first step, an answer at a time. Raises BadInput for what cannot work."""
    if names := checkable(planned):
        yield preflight(planned, names, registry, launcher, execution)
    yield from without_a_model(planned, registry, launcher, execution)


def without_a_model(
    planned: Sequence[Planned], registry: Registry, launcher: Launcher, execution: Execution
) -> Iterator[list[Finding]]:
    """As much of it as needs no tokenizer."""
    yield audits(planned, registry, launcher, execution)


def waits_for_data(one: Planned, planned: Sequence[Planned]) -> bool:
    """Whether a step's data are made by a step that runs first."""
    source = one.step.inputs.get("data")
    return source is not None and any(other.step.name == source.step and other.action == "run" for other in planned)


def audit(
    one: Planned,
    rows: Path | None,
    registry: Registry,
    launcher: Launcher,
    execution: Execution,
    on_metrics: OnMetrics = lambda line: None,
) -> audit_job.Report:
    """What the rewards of a grpo step pay for, on the first of its rows or on those of a file. Its policy need not be
    there. Raises BadInput for another kind of step, and for rows that cannot be read."""
    rewards = rewards_of(one.step)
    if rewards is None:
        raise BadInput(f"{one.step.name} is of kind {one.step.kind}; an audit looks at the rewards of a grpo stage")
    like = job_of(one.step.model_copy(update={"inputs": {}}), {}, registry, execution)
    inputs = {"rows": str(rows.absolute())} if rows else {}
    with _question("audit", {"weights": rewards.weights}, like, inputs) as job:
        launcher.launch(job, on_metrics=on_metrics)
        return audit_job.Report.model_validate_json(Path(job.out, audit_job.FILE).read_text(encoding="utf-8"))


def audits(planned: Sequence[Planned], registry: Registry, launcher: Launcher, execution: Execution) -> list[Finding]:
    """What an audit has to say about the grpo steps that are about to run, once for those with the same rewards."""
    different = dict[str, Planned]()
    for one in planned:
        if one.action == "run" and STAGES[one.step.kind].audited(one.step.config):
            different.setdefault(_paid_by(one), one)
    reports = [audit(one, None, registry, launcher, execution) for one in different.values()]
    return [finding for report in reports for finding in report.findings]


def _paid_by(one: Planned) -> str:
    """What decides a step's rewards, but for its rows."""
    rewards = rewards_of(one.step)
    settings = rewards.model_dump(mode="json") if rewards else None
    return json.dumps([one.step.problem, settings, one.step.format.model_dump(mode="json")], sort_keys=True)


def rewards_of(step: Step) -> Rewards | None:
    """The rewards that a step is trained by; None for a kind that has none."""
    return STAGES[step.kind].rewards(step.config)


def loss_map(
    one: Planned, planned: Sequence[Planned], row: int, registry: Registry, launcher: Launcher
) -> dict[str, Any]:
    """The loss map of a row of an sft step. Raises BadInput for another kind of step, for data that are not made yet,
    and for no such row."""
    step = one.step
    if not STAGES[step.kind].weighs_tokens:
        raise BadInput(f"{step.name} is of kind {step.kind}; inspect shows what an sft stage trains on")
    source = step.inputs.get("data")
    if source and not _is_there(source.step, planned):
        raise BadInput(
            f"{step.name} trains on {source.step}, which has not been made yet; run it first, with --until "
            f"{source.step}"
        )
    like = stand_in(one, planned, registry, Execution())
    with _question("inspect", {"stage": step.config.model_dump(mode="json"), "row": row}, like, like.inputs) as job:
        result = launcher.launch(job)
        return {**json.loads(Path(job.out, loss_map_file.FILE).read_text(encoding="utf-8")), "metrics": result.metrics}


def probe(
    config: dict[str, Any],
    like: Planned,
    policies: dict[str, str],
    registry: Registry,
    launcher: Launcher,
    execution: Execution,
    on_metrics: OnMetrics,
) -> list[dict[str, Any]]:
    """The lines of a probe, `like` an evaluation of the recipe; `policies` says where the policies are."""
    job = job_of(like.step, {}, registry, execution)
    with _question("probe", config, job, policies) as question:
        launcher.launch(question, on_metrics=on_metrics)
        return json.loads(Path(question.out, probe_job.FILE).read_text(encoding="utf-8"))["lines"]


def score(problem: dict[str, Any], rows: Path, completions: Path, launcher: Launcher) -> dict[str, Any]:
    """What `stages.inspections.score` finds out about a file of completions. Raises BadInput with file and line for
    what cannot be used."""
    inputs = {"rows": str(rows.absolute()), "completions": str(completions.absolute())}
    with _question("score", {}, _of_problem("score", problem), inputs) as job:
        launcher.launch(job)
        return json.loads(Path(job.out, score_job.FILE).read_text(encoding="utf-8"))


def rows(problem: dict[str, Any], config: rows_job.RowsConfig, seed: int, launcher: Launcher) -> Iterator[str]:
    """The rows of a split, a line of JSON each. Raises BadInput for more than there are."""
    like = _of_problem("rows", problem).model_copy(update={"seed": seed})
    with _question("rows", config.model_dump(mode="json"), like, {}) as job:
        launcher.launch(job)
        with Path(job.out, rows_job.FILE).open(encoding="utf-8") as file:
            yield from file


def _of_problem(kind: str, problem: dict[str, Any]) -> Job:
    """A job that asks a problem alone, without a step of a recipe."""
    return Job(
        kind=kind,
        name=kind,
        config={},
        inputs={},
        work="",
        out="",
        problem=problem,
        rows=None,
        format=None,
        seed=0,
        dtype="float32",
        execution=Execution(),
    )


def stand_in(one: Planned, planned: Sequence[Planned], registry: Registry, execution: Execution) -> Job:
    """A step's job with what is there: an ancestor for a policy that is not made yet, no data where they are not."""
    made = {other.step.name: other.artifact for other in planned if other.artifact}
    inputs = {role: ref for role, ref in one.step.inputs.items() if ref.step is None or ref.step in made}
    job = job_of(one.step.model_copy(update={"inputs": inputs}), made, registry, execution)
    return job.model_copy(update={"inputs": {**job.inputs, "policy": _policy(one, planned, made, registry)}})


def _policy(one: Planned, planned: Sequence[Planned], made: Mapping[str, Artifact], registry: Registry) -> str:
    """Where the step's policy lies, or the nearest one before it that is there."""
    ref = one.step.inputs["policy"]
    if ref.step is None or ref.step in made:
        return place_of(ref, made, registry)
    return _policy(next(other for other in planned if other.step.name == ref.step), planned, made, registry)


def _is_there(step: str | None, planned: Sequence[Planned]) -> bool:
    """Whether what a step makes can be read; a base model and a file always can."""
    return step is None or next(other.artifact for other in planned if other.step.name == step) is not None


@contextmanager
def _question(kind: str, config: dict[str, Any], like: Job, inputs: Mapping[str, str]) -> Iterator[Job]:
    """A job with a temporary directory of its own, which is gone afterwards but for a failure whose line names a log
    there."""
    work = Path(tempfile.mkdtemp(prefix=f"switchback-{kind}-"))
    execution = like.execution.model_copy(update={"processes": 1, "accelerate": None})
    what: dict[str, Any] = {
        "kind": kind,
        "config": config,
        "inputs": dict(inputs),
        "work": str(work),
        "out": str(work / "out"),
    }
    try:
        yield like.model_copy(update={**what, "execution": execution})
    except StageFailed as error:
        if str(work) not in str(error):
            shutil.rmtree(work)
        raise
    except BaseException:
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
