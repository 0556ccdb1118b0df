"""What a run did, read off the registry: stage by stage, with the held-out evaluation of each policy. Files in, plain
data out."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.registry import Registry, runs
from stages.config import Frozen
from stages.errors import BadInput
from stages.evaluate import EVALUATE
from stages.job import Evaluation, Split, read_evaluation
from stages.stage import BASE


class StageSummary(Frozen):
    """One stage of a run."""

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


EVALUATION_FIELDS = ("greedy", "mean", "interval", "solved", "format", "pass_at_k", "rows", "unscored", "samples")
"""What of an Evaluation `show --json` gives."""


def summarise(registry: Registry, run: str, split: Split = "held_out") -> RunSummary:
    """Raises BadInput when there is no such run, or when a file of an evaluation is not what was published."""
    done = {event["step"]: event for event in runs.events(registry, run) if event["event"] == "step"}
    planned = runs.planned(registry, run)
    stages_of_run = [(step["step"], step["kind"]) for step in planned["steps"] if step["kind"] != EVALUATE]
    base = StageSummary(
        name=BASE,
        kind=BASE,
        artifact=None,
        path=planned["base"],
        reused=True,
        seconds=0.0,
        evaluation=_evaluation(registry, BASE, done, split),
    )
    stages = (base, *(_stage(registry, name, kind, done, split) for name, kind in stages_of_run))
    return RunSummary(run=run, recipe=planned["recipe"], state=runs.state(registry, run), stages=stages)


def as_json(summary: RunSummary) -> dict[str, Any]:
    """The shape of `show --json`."""
    content = summary.model_dump(mode="json")
    for stage in content["stages"]:
        if evaluation := stage["evaluation"]:
            stage["evaluation"] = {name: evaluation[name] for name in EVALUATION_FIELDS}
    return content


def _stage(registry: Registry, name: str, kind: str, done: dict[str, dict[str, Any]], split: Split) -> StageSummary:
    event = done.get(name)
    artifact = registry.get(event["artifact"]) if event else None
    return StageSummary(
        name=name,
        kind=kind,
        artifact=artifact.id if artifact else None,
        path=registry.location(artifact) if artifact else None,
        reused=event["reused"] if event else None,
        seconds=event["seconds"] if event else None,
        evaluation=_evaluation(registry, name, done, split),
    )


def _evaluation(registry: Registry, of: str, done: dict[str, dict[str, Any]], split: Split) -> Evaluation | None:
    """What the evaluate step of a policy found; None where there is none, or none any more."""
    event = done.get(f"{of}.evaluate")
    artifact = registry.get(event["artifact"]) if event else None
    if artifact is None:
        return None
    path = registry.path(artifact, split)
    try:
        return read_evaluation(path)
    except (OSError, ValidationError):
        raise BadInput(f"{path} is no longer what was published; run switchback verify {artifact.id}") from None
