"""One step, from its plan to its artifact: find, launch, check, publish. A plain function, without Prefect.

The registry decides whether a step has been done. Work in progress lies in `<work>/<first 12 digits of the key>/`, so the same step always finds
its own place; what is published leaves it by a rename.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from pipeline.errors import StageFailed
from pipeline.evaluations import Difference
from pipeline.launch import Launcher
from pipeline.mirror import forget, mirrored
from pipeline.plan import Planned
from pipeline.registry import Artifact, Published, Registry, Source, UnsafeFile, runs
from pipeline.registry.store import Store
from pipeline.registry.verify import as_read, condemn
from pipeline.steps import InputRef, Step
from stages.errors import BadInput
from stages.job import Evaluation, Execution, Finding, Job, Result
from stages.runtime import checkpoints, locks
from stages.runtime.metrics import FILE as METRICS
from stages.runtime.workdir import RUN_LOCK, directory_name

WORK = "SWITCHBACK_WORK"
"""Environment variable that moves work in progress to another disk."""


TICK = 0.5
"""Seconds between two calls of `on_tick` while another run is waited for."""
HOLDER_PATIENCE = 1.0
"""Seconds in which the holder of a lock has written its pid."""


class Observer(Protocol):
    """Hears what happens to steps, to show it."""

    def found(self, finding: Finding) -> None:
        """A preflight has something to say."""

    def reused(self, step: Step, artifact: Artifact) -> None:
        """It was there."""

    def skipped(self, step: Step) -> None:
        """It was not selected."""

    def waiting(self, step: Step, pid: str) -> None:
        """Another run, process `pid` ("" where that is not known), is making it."""

    def started(self, step: Step, why: str) -> None:
        """Its job begins, and why it has to."""

    def said(self, step: Step, text: str) -> None:
        """Its job has something to say, such as where it goes on."""

    def logged(self, step: Step, line: dict[str, Any]) -> None:
        """Its job has written a line of metrics."""

    def finished(self, step: Step, artifact: Artifact) -> None:
        """It has been published."""

    def evaluated(self, step: Step, found: Evaluation, before: str, gain: Difference | None) -> None:
        """What an evaluation found on held-out rows, and how much better that is than `before`, the policy that the stage started from. None: there is none,
        or it cannot be compared."""


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


def sources_of(step: Step, made: Mapping[str, Artifact], registry: Registry) -> dict[str, Source]:
    """What a step reads, as its artifact will remember it."""
    return {role: _source(ref, _artifact(ref, made, registry)) for role, ref in step.inputs.items()}


def _source(ref: InputRef, artifact: Artifact | None) -> Source:
    if artifact is None:
        return Source(id=None, output=ref.output, key=ref.key, name=ref.source)
    return Source(id=artifact.id, output=ref.output, key=ref.key, name=artifact.stage, digest=artifact.digest)


def _artifact(ref: InputRef, made: Mapping[str, Artifact], registry: Registry) -> Artifact | None:
    """The artifact that an input is; None for a model or a file from elsewhere."""
    if ref.step:
        return made[ref.step]
    return registry.open(ref.artifact) if ref.artifact else None


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


@contextmanager
def alone(work: Path, on_wait: Callable[[str], None], on_tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Be the only run on this machine that makes this step, from the look into the registry to its publication.

    Where another run is at it, `on_wait` hears that run's pid, once, and `on_tick` is called again and again. The kernel frees the lock whatever ends its
    holder.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / RUN_LOCK).open("a+") as lock:
        if not locks.try_lock(lock):
            on_wait(locks.holder(lock, HOLDER_PATIENCE))
            while not locks.lock_within(lock, TICK):
                on_tick()
        locks.write_holder(lock)
        try:
            yield
        finally:
            locks.erase_holder(lock)  # so that no run names a holder that has ended


def job_of(step: Step, made: Mapping[str, Artifact], registry: Registry, execution: Execution) -> Job:
    """The step as marching orders, with places filled in."""
    work = work_of(step, registry)
    inputs = {role: place_of(ref, made, registry) for role, ref in step.inputs.items()}
    return Job(
        kind=step.kind,
        name=step.name,
        config=step.config,
        inputs=inputs,
        sources={role: _told(source) for role, source in sources_of(step, made, registry).items()},
        work=str(work),
        out=str(work / "out"),
        problem=step.problem,
        rows=step.rows,
        format=step.format,
        seed=step.seed,
        dtype=step.dtype,
        lora=step.lora,
        sampler=step.sampler,
        execution=_execution(execution),
    )


def _told(source: Source) -> str:
    """What is told of an input in what is made from it: an id, a hub's name, or of a path its last part; no path of this machine."""
    return source.id or (Path(source.name).name if Path(source.name).is_absolute() else source.name)


def place_of(ref: InputRef, made: Mapping[str, Artifact], registry: Registry) -> str:
    """Where a worker can read an input."""
    artifact = _artifact(ref, made, registry)
    return str(registry.path(artifact, ref.output)) if artifact else ref.source


def _execution(execution: Execution) -> Execution:
    """With a path that does not depend on where the job runs."""
    file = execution.accelerate
    return execution.model_copy(update={"accelerate": str(Path(file).absolute())}) if file else execution


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
        config={**step.config, "execution": job.execution.model_dump()},
        identity=step.identity,
        metrics=result.metrics,
        provenance={"run": run, "host": socket.gethostname(), **result.seen, **_said(result)},
    )


def _said(result: Result) -> dict[str, Any]:
    """What the stage had to say about itself, where it had something."""
    return {"findings": [finding.model_dump(mode="json") for finding in result.findings]} if result.findings else {}


def work_of(step: Step, registry: Registry) -> Path:
    """The step's own directory, in which it always finds itself again."""
    return work_root(registry) / directory_name(step.key)


def work_root(registry: Registry) -> Path:
    """Where work in progress lies: SWITCHBACK_WORK, else `work/` in the registry."""
    return Path(os.environ.get(WORK) or registry.store.work).absolute()
