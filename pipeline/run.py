"""One step, from its plan to its artifact: find, launch, check, publish. A plain function, without Prefect.

The registry decides whether a step has been done. Work in progress lies in `<work>/<first 12 digits of the key>/`, so the same step always finds
its own place; what is published leaves it by a rename.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from pipeline.launch import Launcher, StageFailed
from pipeline.plan import Planned
from pipeline.registry import Artifact, Registry, Source, UnsafeFile
from pipeline.steps import Step
from stages.job import Execution, Finding, Job, Result

WORK = "SWITCHBACK_WORK"
"""Environment variable that moves work in progress to another disk."""


class Observer(Protocol):
    """Hears what happens to steps, to show it."""

    def found(self, finding: Finding) -> None:
        """A preflight has something to say."""

    def reused(self, step: Step, artifact: Artifact) -> None:
        """It was there."""

    def skipped(self, step: Step) -> None:
        """It was not selected."""

    def waiting(self, step: Step, pid: str) -> None:
        """Another run, process `pid`, is making it."""

    def started(self, step: Step) -> None:
        """Its job begins."""

    def logged(self, step: Step, line: dict[str, Any]) -> None:
        """Its job has written a line of metrics."""

    def finished(self, step: Step, artifact: Artifact) -> None:
        """It has been published."""


def run_step(
    planned: Planned,
    made: Mapping[str, Artifact],
    registry: Registry,
    launcher: Launcher,
    execution: Execution,
    observer: Observer,
    run: str,
) -> tuple[Artifact, bool]:
    """(the step's artifact, whether it was reused). `made` holds the artifacts of the steps before it.

    Raises StageFailed when the stage did not end well, BadInput when it refused what it was given.
    """
    step = planned.step
    if artifact := registry.find(step.key):
        observer.reused(step, artifact)
        return artifact, True
    job = job_of(step, made, registry, execution)
    with alone(Path(job.work), lambda pid: observer.waiting(step, pid)):
        if artifact := registry.find(step.key) or registry.recover(step.key):  # another run has made it since
            observer.reused(step, artifact)
            return artifact, True
        observer.started(step)
        result = launcher.launch(job, step.deadline, lambda line: observer.logged(step, line))
        for finding in result.findings:
            observer.found(finding)
        artifact = publish(step, job, result, made, registry, run)
    if artifact.provenance["run"] != run:  # a maker on another machine was first
        observer.reused(step, artifact)
        return artifact, True
    observer.finished(step, artifact)
    return artifact, False


@contextmanager
def alone(work: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Be the only run on this machine that makes this step, from the look into the registry to its publication.

    Where another run is at it, `on_wait` hears that run's pid, once. The kernel frees the lock whatever ends its holder.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            on_wait(lock.read().strip())
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def job_of(step: Step, made: Mapping[str, Artifact], registry: Registry, execution: Execution) -> Job:
    """The step as marching orders, with places filled in."""
    work = work_root(registry) / step.key[:12]
    inputs = {
        role: str(registry.path(made[ref.step], ref.output)) if ref.step else ref.source
        for role, ref in step.inputs.items()
    }
    return Job(
        kind=step.kind,
        name=step.name,
        config=step.config,
        inputs=inputs,
        work=str(work),
        out=str(work / "out"),
        problem=step.problem,
        rows=step.rows,
        format=step.format,
        seed=step.seed,
        dtype=step.dtype,
        lora=step.lora,
        execution=_execution(execution),
    )


def _execution(execution: Execution) -> Execution:
    """With a path that does not depend on where the job runs."""
    file = execution.accelerate
    return execution.model_copy(update={"accelerate": str(Path(file).absolute())}) if file else execution


def publish(
    step: Step, job: Job, result: Result, made: Mapping[str, Artifact], registry: Registry, run: str
) -> Artifact:
    """Check what the worker says it made, and hand it to the registry."""
    out = Path(job.out)
    for name, path in result.outputs.items():
        if not (out / path).exists():
            raise StageFailed(f"{step.name}: it says that {name} lies at {path}, but nothing is there")
    sources = {
        role: Source(id=made[ref.step].id if ref.step else None, output=ref.output, key=ref.key, name=ref.source)
        for role, ref in step.inputs.items()
    }
    try:
        return registry.publish(out, _draft(step, job, result, sources, run))
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
        config={**step.config, "execution": job.execution.model_dump()},
        identity=step.identity,
        metrics=result.metrics,
        provenance={"run": run, "host": socket.gethostname(), **result.seen, **_said(result)},
    )


def _said(result: Result) -> dict[str, Any]:
    """What the stage had to say about itself, where it had something."""
    return {"findings": [finding.model_dump(mode="json") for finding in result.findings]} if result.findings else {}


def work_root(registry: Registry) -> Path:
    """Where work in progress lies: SWITCHBACK_WORK, else `work/` in the registry."""
    return Path(os.environ.get(WORK) or registry.root / "work").absolute()
