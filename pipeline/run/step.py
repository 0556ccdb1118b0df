"""One step, from its plan to its artifact: find, launch, check, publish. A plain function, without Prefect.

The registry decides whether a step has been done. Work in progress lies in `<work>/<first 12 digits of the key>/`, so
the same step always finds its own place; what is published leaves it by a rename."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline.errors import StageFailed
from pipeline.plan.plan import Planned
from pipeline.plan.steps import Step
from pipeline.registry import Artifact, Published, Registry, Source, UnsafeFile
from pipeline.registry.verify import as_read, condemn
from pipeline.registry.workdir import alone
from pipeline.run.hub import COMMIT, checked_commit
from pipeline.run.job import job_of, sources_of, work_of
from pipeline.run.mirror import forget, mirrored
from pipeline.run.run import Run
from pipeline.run.user_files import as_planned
from stages.job import Finding, Job, Result
from stages.runtime import checkpoints, signals
from stages.runtime.metrics import FILE as METRICS
from stages.runtime.workdir import directory_name


class Made(NamedTuple):
    """A step's artifact, and where it is from."""

    artifact: Artifact
    reused: bool
    """The registry had it already, or another run was first."""


def make(planned: Planned, run: Run) -> Made:
    """Find the step's artifact in the registry, or run its job and publish what it made. `run.made` holds the
    artifacts of the steps before it.

    Raises StageFailed when the stage did not end well, BadInput when it refused what it was given.
    """
    step = planned.step
    artifact = _held(step, run)
    if artifact:
        return _reuse(step, artifact, run)
    work = work_of(step, run.registry)
    with alone(run.registry, work, lambda pid: run.observer.waiting(step, pid), lambda: run.beat(step)):
        artifact = _held(step, run) or run.registry.recover(step.key, step.name, run.id)
        if artifact:
            checkpoints.clear(work)  # another run has made it since
            return _reuse(step, artifact, run)
        artifact, lost = _run_and_publish(planned, work, run)
    if lost is not None:  # a maker on another machine was first
        for finding in differences(artifact, lost):
            run.observer.found(finding)
        run.observer.reused(step, artifact)
        return Made(artifact, reused=True)
    run.observer.finished(step, artifact)
    return Made(artifact, reused=False)


def _reuse(step: Step, artifact: Artifact, run: Run) -> Made:
    forget(run.mirror, directory_name(step.key), lambda text: run.say(step, text))
    run.observer.reused(step, artifact)
    return Made(artifact, reused=True)


def _run_and_publish(planned: Planned, work: Path, run: Run) -> Published:
    """The step's job, in a work directory that this run holds."""
    step = planned.step
    sources = sources_of(step, run.made, run.registry)
    refuse_damaged(step, sources, run.registry)
    run.observer.started(step, planned.why)

    def say(text: str) -> None:
        run.say(step, text)

    def drop_checkpoints(why: str) -> None:
        say(f"its checkpoints are removed: {why}")
        _clear(work, run, say)

    at_start = checked_commit(step, run.made)
    with ExitStack() as stack:
        with as_planned(step, work, drop_checkpoints) as copies:
            job = job_of(step, run.made, run.registry, run.execution, copies)
            result = _launched(step, job, work, run, say)
            stack.enter_context(signals.postponed())  # what the stage has made is published first
        if commit := checked_commit(step, run.made, at_start):
            result = result.model_copy(update={"seen": {**result.seen, COMMIT: commit}})
        for finding in result.findings:
            run.observer.found(finding)
        published = publish(step, job, result, sources, run)
        _clear(work, run, say)
    if run.launcher.asked_to_end is not None:
        raise run.launcher.asked_to_end
    return published


def _launched(step: Step, job: Job, work: Path, run: Run, say: Callable[[str], None]) -> Result:
    """The job, run to its end, with a copy of its checkpoints in the mirror."""
    with mirrored(run.mirror, work.name, work, job.execution.grace, say) as look:

        def tick() -> None:
            look()
            run.beat(step)

        return run.launcher.launch(job, step.deadline, lambda line: run.observer.logged(step, line), say, tick)


def _clear(work: Path, run: Run, say: Callable[[str], None]) -> None:
    """Remove the step's checkpoints, here and in the mirror."""
    checkpoints.clear(work)
    forget(run.mirror, work.name, say)


def _held(step: Step, run: Run) -> Artifact | None:
    """What the registry has for a step, held by this run; None when it has nothing."""
    found = run.registry.find(step.key)
    if found and run.registry.hold(found, run.id):
        return found
    return None


def refuse_damaged(step: Step, sources: Mapping[str, Source], registry: Registry) -> None:
    """Raise StageFailed when an input is no longer what was published; its key is then void, so that it can be made
    again."""
    for source in sources.values():
        artifact = registry.open(source.id) if source.id else None
        wrong = as_read(registry, artifact) if artifact else None
        if artifact and wrong:
            condemn(registry, artifact.id)
            raise StageFailed(
                f"{step.name}: its input is damaged: {wrong[0]}; {artifact.id} is void now; run the recipe again, "
                f"{artifact.stage} included, to make it again"
            )


def differences(winner: Artifact, lost: Artifact) -> Iterator[Finding]:
    """What two makers of one key did not agree on; the log of metrics holds times, and is not compared."""
    theirs, ours = ({file.path: file.sha256 for file in one.files if file.path != METRICS} for one in (winner, lost))
    differing = sorted(path for path in theirs.keys() | ours.keys() if theirs.get(path) != ours.get(path))
    if differing:
        yield Finding(
            rule="two_makers",
            severity="warn",
            stage=winner.stage,
            evidence={"files": len(differing)},
            advice=f"two runs made this step at once and their results differ ({', '.join(differing[:3])}); "
            f"{winner.id} was first and is used",
        )


def publish(step: Step, job: Job, result: Result, sources: dict[str, Source], run: Run) -> Published:
    """Check what the worker says it made, and hand it to the registry."""
    out = Path(job.out)
    for name, path in result.outputs.items():
        if not (out / path).exists():
            raise StageFailed(f"{step.name}: it says that {name} lies at {path}, but nothing is there")
    try:
        return run.registry.publish(out, _draft(step, job, result, sources, run.id), run.id)
    except (UnsafeFile, ValidationError) as error:
        raise StageFailed(f"{step.name}: {' '.join(str(error).split())}") from None


def _draft(step: Step, job: Job, result: Result, sources: dict[str, Source], run: str) -> Artifact:
    """The artifact, but for what the registry gives it: id, date, files."""
    return Artifact(
        id="",
        key=step.key,
        kind=step.kind,
        stage=step.name,
        created="",
        outputs=result.outputs,
        files=(),
        inputs=sources,
        format=result.format,
        config={**job.config, "execution": job.execution.model_dump()},
        identity=step.identity,
        metrics=result.metrics,
        provenance={"run": run, "host": socket.gethostname(), **result.seen, **_findings(result)},
    )


def _findings(result: Result) -> dict[str, Any]:
    """The stage's findings about itself, where it has any."""
    if not result.findings:
        return {}
    return {"findings": [finding.model_dump(mode="json") for finding in result.findings]}
