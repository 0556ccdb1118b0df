"""What a run did, read off the registry: stage by stage, with the held-out evaluation of each policy. Files in, plain data out."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.checks import BASE
from pipeline.registry import Artifact, Registry, runs
from stages.config import Frozen
from stages.job import BadInput, Evaluation, Split, read_evaluation


class StageSummary(Frozen):
    """One box of a run."""

    name: str
    kind: str
    artifact: str | None
    """None for the base model, and for a stage that was not made."""
    path: str | None
    reused: bool | None
    seconds: float | None
    """Of the stage's own work in this run; 0 when it was reused."""
    evaluation: Evaluation | None


class RunSummary(Frozen):
    """A run."""

    run: str
    recipe: str
    state: str
    stages: tuple[StageSummary, ...]


EVALUATION_FIELDS = ("greedy", "mean", "interval", "solved", "format", "pass_at_k", "rows", "samples")
"""What of an Evaluation `show --json` gives."""


def summarise(registry: Registry, run: str, split: Split = "held_out") -> RunSummary:
    """Raises BadInput when there is no such run."""
    done = {event["step"]: event for event in runs.events(registry, run) if event["event"] == "step"}
    planned = runs.planned(registry, run)
    steps, recipe = planned["steps"], planned["recipe"]
    boxes = [(BASE, "base"), *((step["step"], step["kind"]) for step in steps if step["kind"] != "evaluate")]
    state = runs.state(registry, run)
    stages = tuple(_stage(registry, name, kind, done, split) for name, kind in boxes)
    return RunSummary(run=run, recipe=recipe, state=state, stages=stages)


def as_json(summary: RunSummary) -> dict[str, Any]:
    """The shape of `show --json`."""
    content = summary.model_dump(mode="json")
    for stage in content["stages"]:
        if evaluation := stage["evaluation"]:
            stage["evaluation"] = {name: evaluation[name] for name in EVALUATION_FIELDS}
    return content


def _stage(registry: Registry, name: str, kind: str, done: dict[str, dict[str, Any]], split: Split) -> StageSummary:
    event, evaluated = done.get(name), done.get(f"{name}.evaluate")
    artifact = registry.get(event["artifact"]) if event else None
    evaluation = registry.get(evaluated["artifact"]) if evaluated else None
    if artifact:
        path = str(registry.path(artifact))
    else:
        path = evaluation.inputs["policy"].name if evaluation and name == BASE else None
    return StageSummary(
        name=name,
        kind=kind,
        artifact=artifact.id if artifact else None,
        path=path,
        reused=event["reused"] if event else (True if name == BASE else None),
        seconds=event["seconds"] if event else (0.0 if name == BASE else None),
        evaluation=_read(registry, evaluation, split) if evaluation else None,
    )


def _read(registry: Registry, evaluation: Artifact, split: Split) -> Evaluation:
    path = registry.path(evaluation, split)
    try:
        return read_evaluation(path)
    except (OSError, ValidationError):
        raise BadInput(f"{path} is no longer what was published; run switchback verify {evaluation.id}") from None
