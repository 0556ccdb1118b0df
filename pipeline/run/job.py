"""From a Step to its Job: every input becomes a path that a worker can read, and a source that its artifact will
name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.plan.base import InputRef
from pipeline.plan.steps import Step
from pipeline.registry import Artifact, Registry, Source
from pipeline.registry.workdir import work_root
from stages.job import Execution, Job
from stages.runtime.workdir import NO_COPIES, Copies, directory_name


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


def job_of(
    step: Step,
    made: Mapping[str, Artifact],
    registry: Registry,
    execution: Execution,
    copies: Copies = NO_COPIES,
) -> Job:
    """The step as marching orders, with places filled in."""
    work = work_of(step, registry)
    inputs = {role: place_of(ref, made, registry) for role, ref in step.inputs.items()}
    return Job(
        kind=step.kind,
        name=step.name,
        config=step.config.model_dump(mode="json"),
        inputs=inputs,
        sources={role: _public_name(source) for role, source in sources_of(step, made, registry).items()},
        copies=dict(copies),
        work=str(work),
        out=str(work / "out"),
        problem=step.problem,
        rows=step.rows,
        evaluated=step.evaluated,
        format=step.format,
        seed=step.seed,
        dtype=step.dtype,
        lora=step.lora,
        own_positions=step.own_positions,
        sampler=step.sampler,
        execution=_execution(execution),
    )


def _public_name(source: Source) -> str:
    """The name of an input in files that a stage writes: an id, a hub's name, or the last part of a path, so that no
    file holds a path of this machine."""
    return source.id or (Path(source.name).name if Path(source.name).is_absolute() else source.name)


def place_of(ref: InputRef, made: Mapping[str, Artifact], registry: Registry) -> str:
    """Where a worker can read an input."""
    artifact = _artifact(ref, made, registry)
    return str(registry.path(artifact, ref.output)) if artifact else ref.source


def _execution(execution: Execution) -> Execution:
    """With a path that does not depend on where the job runs."""
    file = execution.accelerate
    return execution.model_copy(update={"accelerate": str(Path(file).absolute())}) if file else execution


def work_of(step: Step, registry: Registry) -> Path:
    """The step's own directory, in which it always finds itself again."""
    return work_root(registry) / directory_name(step.key)
