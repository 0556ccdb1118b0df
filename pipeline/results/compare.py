"""Two artifacts side by side: what was asked of them, how they were run, what came of it. Two artifacts and the
registry in, plain data out.

Scores and answers are those of the two policies' evaluations. Only evaluations with equal settings are compared row by
row, since only those saw the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from pipeline.registry import Artifact, Registry
from pipeline.registry.keys import changes
from pipeline.results.evaluations import of_policy, settings
from stages.config import Frozen
from stages.errors import BadInput
from stages.evaluate import EVALUATE
from stages.job import SPLITS, Evaluation, read_evaluation

SHOWN = 3
"""Rows of which both answers are shown."""
SEEN = ("processes", "threads", "device", "versions")
"""What of an artifact's provenance says how it was run."""
SCORED = tuple(split for split in SPLITS if split != "train")

Pair = tuple[Any, Any]
"""What the first has, what the second has; None where it has none."""


_Answered = tuple[Any, tuple[str, ...]]
"""(The score of a greedy answer, or the scores of what was kept; the answers)."""
_Rows = dict[str, _Answered]


class Sample(Frozen):
    """One row, as both answered it."""

    row: str
    scores: Pair
    """0..1: of the greedy answers, or of the rollouts that were kept."""
    answers: tuple[tuple[str, ...], tuple[str, ...]]


class Comparison(Frozen):
    """What two artifacts do not have in common, and what they can be measured by."""

    ids: tuple[str, str]
    asked: dict[str, Pair]
    """Field of the identity -> both values, where they differ."""
    execution: dict[str, Pair]
    """How they were run, where that differs; it is no part of the key."""
    format: dict[str, Pair]
    """Field of the Format -> both values, where they differ."""
    metrics: dict[str, Pair]
    """Every metric of either."""
    scores: dict[str, tuple[Evaluation | None, Evaluation | None]]
    """Split -> the Evaluations; empty where neither was evaluated."""
    comparable: bool
    """Whether both were evaluated with the same settings; False where one of them was not."""
    samples: tuple[Sample, ...]
    """The first rows that came out differently: validation rows of policies, rows of rejection sampling by what was
    kept."""


def compare(registry: Registry, a: Artifact, b: Artifact) -> Comparison:
    """Raises BadInput where a file of an evaluation or of rollouts is not what was published."""
    evaluations = _evaluations(registry, a, b)
    first, second = evaluations
    comparable = first is not None and second is not None and settings(first) == settings(second)
    return Comparison(
        ids=(a.id, b.id),
        asked=changes(a.identity, b.identity),
        execution=changes(_execution(a), _execution(b)),
        format=changes(_format(a), _format(b)),
        metrics={name: (a.metrics.get(name), b.metrics.get(name)) for name in {**a.metrics, **b.metrics}},
        scores=_scores(registry, evaluations),
        comparable=comparable,
        samples=tuple(_samples(registry, a, b, evaluations if comparable else (None, None))),
    )


def _execution(artifact: Artifact) -> dict[str, Any]:
    seen = {name: artifact.provenance[name] for name in SEEN if name in artifact.provenance}
    return {"asked": artifact.config.get("execution"), "seen": seen}


def _format(artifact: Artifact) -> dict[str, Any]:
    return artifact.format.model_dump() if artifact.format else {}


def _evaluations(registry: Registry, a: Artifact, b: Artifact) -> tuple[Artifact | None, Artifact | None]:
    """The evaluations of two policies: the newest two with equal settings, else the newest of each. An evaluation
    stands for itself."""
    ours, theirs = ([one] if one.kind == EVALUATE else of_policy(registry, one) for one in (a, b))
    for mine in ours:
        for other in theirs:
            if settings(mine) == settings(other):
                return mine, other
    return next(iter(ours), None), next(iter(theirs), None)


def _scores(
    registry: Registry, evaluations: tuple[Artifact | None, Artifact | None]
) -> dict[str, tuple[Evaluation | None, Evaluation | None]]:
    if evaluations == (None, None):
        return {}
    a, b = evaluations
    return {split: (_read(registry, a, split), _read(registry, b, split)) for split in SCORED}


def _read(registry: Registry, evaluation: Artifact | None, split: str) -> Evaluation | None:
    if evaluation is None or split not in evaluation.outputs:
        return None
    try:
        return read_evaluation(registry.path(evaluation, split))
    except (OSError, ValidationError):
        raise _changed(evaluation) from None


def _samples(
    registry: Registry, a: Artifact, b: Artifact, evaluations: tuple[Artifact | None, Artifact | None]
) -> Iterator[Sample]:
    """The first rows that came out differently."""
    if {"data", "rollouts"} <= a.outputs.keys() & b.outputs.keys():
        ours, theirs = _kept(registry, a), _kept(registry, b)
    elif evaluations[0] and evaluations[1]:
        ours, theirs = _greedy(registry, evaluations[0]), _greedy(registry, evaluations[1])
    else:
        return
    none = (None, ())
    pairs = [(row, ours.get(row, none), theirs.get(row, none)) for row in {**ours, **theirs}]
    for row, (mine, my_answers), (other, their_answers) in [pair for pair in pairs if _differ(*pair[1:])][:SHOWN]:
        yield Sample(row=row, scores=(mine, other), answers=(my_answers, their_answers))


def _differ(ours: _Answered, theirs: _Answered) -> bool:
    """Whether a row came out differently: by its score; where several rollouts were kept, by what they say."""
    if isinstance(ours[0] or theirs[0], list):
        return ours != theirs
    return ours[0] != theirs[0]


def _greedy(registry: Registry, evaluation: Artifact) -> _Rows:
    """A row's greedy answer."""
    lines = _lines(registry, evaluation, "validation.jsonl")
    try:
        return {line["row"]: (line["greedy"]["score"], (line["greedy"]["text"],)) for line in lines}
    except (KeyError, TypeError):
        raise _changed(evaluation) from None


def _kept(registry: Registry, harvest: Artifact) -> _Rows:
    """What was kept of each row."""
    found: _Rows = {}
    try:
        for line in _lines(registry, harvest, "rollouts/rollouts.jsonl"):
            scores, answers = found.get(line["row"], ([], ()))
            if line["kept"]:
                scores, answers = [*scores, line["score"]], (*answers, line["text"])
            found[line["row"]] = (scores, answers)
    except (KeyError, TypeError):
        raise _changed(harvest) from None
    return found


def _lines(registry: Registry, artifact: Artifact, path: str) -> list[dict[str, Any]]:
    """A published file of JSON lines."""
    if path not in {file.path for file in artifact.files}:
        raise BadInput(f"{artifact.id} has no file {path}, which says what it answered; publish it again")
    try:
        return [json.loads(line) for line in (registry.path(artifact) / path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        raise _changed(artifact) from None


def _changed(artifact: Artifact) -> BadInput:
    return BadInput(f"{artifact.id} is no longer what was published; run switchback verify {artifact.id}")
