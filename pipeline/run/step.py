"""One step, from its plan to its artifact: find, launch, check, publish. A plain function, without Prefect.

The registry decides whether a step has been done. Work in progress lies in `<work>/<first 12 digits of the key>/`, so the same step always finds
its own place; what is published leaves it by a rename.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import StageFailed
from pipeline.launch.local import Launcher
from pipeline.plan.plan import Planned
from pipeline.plan.steps import Step
from pipeline.registry import Artifact, Published, Registry, Source, UnsafeFile, runs
from pipeline.registry.stores.store import Store
from pipeline.registry.verify import as_read, condemn
from pipeline.registry.workdir import alone
from pipeline.run.job import job_of, sources_of, work_of
from pipeline.run.mirror import forget, mirrored
from pipeline.run.observer import Observer
from stages.errors import BadInput
from stages.job import Execution, Finding, Job, Result
from stages.runtime import checkpoints
from stages.runtime.metrics import FILE as METRICS
from stages.runtime.workdir import directory_name


def run_step(
    planned: Planned,
    made: Mapping[str, Artifact],
    registry: Registry,
    launcher: Launcher,
    execution: Execution,
    observer: Observer,
    run: str,
    mirror: Store | None = None,
) -> tuple[Artifact, bool]:
    """(the step's artifact, whether it was reused). `made` holds the artifacts of the steps before it; `mirror` gets its resume checkpoints.

    Raises StageFailed when the stage did not end well, BadInput when it refused what it was given.
    """
    step = planned.step

    def said(text: str) -> None:
        observer.said(step, text)
        with _not_the_end(observer, step):
            runs.record(registry, run, "said", step=step.name, text=text)

    def beat() -> None:
        with _not_the_end(observer, step):
            runs.beat(registry, run)

    if artifact := _held(registry, step, run):
        forget(mirror, directory_name(step.key), said)
        observer.reused(step, artifact)
        return artifact, True
    sources, work = sources_of(step, made, registry), work_of(step, registry)
    with alone(work, lambda pid: observer.waiting(step, pid), beat):
        if artifact := _held(registry, step, run) or registry.recover(step.key, step.name, run):
            checkpoints.clear(work)
            forget(mirror, work.name, said)
            observer.reused(step, artifact)  # another run has made it since
            return artifact, True
        refuse_damaged(step, sources, registry)
        job = job_of(step, made, registry, execution)
        observer.started(step, planned.why)
        with mirrored(mirror, work.name, work, job.execution.grace, said) as look:

            def tick() -> None:
                look()
                beat()

            result = launcher.launch(job, step.deadline, lambda line: observer.logged(step, line), said, tick)
        for finding in result.findings:
            observer.found(finding)
        artifact, lost = publish(step, job, result, sources, registry, run)
        checkpoints.clear(work)
        forget(mirror, work.name, said)
    if lost is not None:  # a maker on another machine was first
        for finding in differences(artifact, lost):
            observer.found(finding)
        observer.reused(step, artifact)
        return artifact, True
    observer.finished(step, artifact)
    return artifact, False


@contextmanager
def _not_the_end(observer: Observer, step: Step) -> Iterator[None]:
    """A registry that does not take what is only said about a run does not end it."""
    try:
        yield
    except (BadInput, OSError) as error:
        observer.said(step, f"could not be remembered: {error}; the stage goes on")


def _held(registry: Registry, step: Step, run: str) -> Artifact | None:
    """What the registry has for a step, held by this run; None when it has nothing."""
    found = registry.find(step.key)
    return found if found and registry.hold(found, run) else None


def refuse_damaged(step: Step, sources: Mapping[str, Source], registry: Registry) -> None:
    """Raise StageFailed when an input is no longer what was published; its key is then void, so that it can be made again."""
    for source in sources.values():
        artifact = registry.open(source.id) if source.id else None
        if artifact and (wrong := as_read(registry, artifact)):
            condemn(registry, artifact.id)
            raise StageFailed(
                f"{step.name}: its input is damaged: {wrong[0]}; {artifact.id} is void now; run the recipe again, {artifact.stage} included, to make it again"
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
            advice=f"two runs made this step at once and their results differ ({', '.join(differing[:3])}); {winner.id} was first and is used",
        )


def publish(
    step: Step, job: Job, result: Result, sources: dict[str, Source], registry: Registry, run: str
) -> Published:
    """Check what the worker says it made, and hand it to the registry."""
    out = Path(job.out)
    for name, path in result.outputs.items():
        if not (out / path).exists():
            raise StageFailed(f"{step.name}: it says that {name} lies at {path}, but nothing is there")
    try:
        return registry.publish(out, _draft(step, job, result, sources, run), run)
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
        provenance={"run": run, "host": socket.gethostname(), **result.seen, **_said(result)},
    )


def _said(result: Result) -> dict[str, Any]:
    """What the stage had to say about itself, where it had something."""
    return {"findings": [finding.model_dump(mode="json") for finding in result.findings]} if result.findings else {}
