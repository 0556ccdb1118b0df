"""The evaluations of a policy, which of two policies' can be compared, and how: those that were asked the same, of
other policies, row by row."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from pipeline.errors import NotComparable
from pipeline.registry import Artifact, Registry
from pipeline.registry.verify import verify
from stages.config import Frozen
from stages.errors import BadInput
from stages.evaluate import EVALUATE
from stages.intervals import of_equal_differences
from stages.job import Split, read_evaluation

OF_THE_POLICY = ("inputs", "format")
"""Fields of an evaluation's identity that differ from policy to policy."""

RESAMPLES, SEED = 2000, 0
"""Of the bootstrap."""
ROUNDING = 1e-12
"""By which differences of equal scores may differ."""


class Difference(Frozen):
    """How much better one evaluation came out than another, on the same rows. Shares in 0..1."""

    difference: float
    """Mean score of the samples, minus the other one's."""
    interval: tuple[float, float]
    """95 % of it: percentile bootstrap, resampling rows."""
    rows: int
    """Those to which both have a score."""


def of_policy(registry: Registry, policy: Artifact) -> list[Artifact]:
    """The evaluate artifacts of a policy that may be used, newest first."""
    found = (one for one in registry.artifacts() if one.kind == EVALUATE and _is_of(one, policy))
    return [one for one in found if registry.usable(one)][::-1]


def settings(evaluation: Artifact) -> dict[str, Any]:
    """Everything that was asked of an evaluation, but for whom."""
    return {name: value for name, value in evaluation.identity.items() if name not in OF_THE_POLICY}


def _is_of(evaluation: Artifact, policy: Artifact) -> bool:
    source = evaluation.inputs.get("policy")
    return source is not None and source.id == policy.id


def difference(registry: Registry, a: Artifact, b: Artifact, split: Split) -> Difference:
    """How much better evaluation `a` came out than `b`, paired by row. Raises NotComparable where they did not see the
    same rows in the same way."""
    if settings(a) != settings(b):
        raise NotComparable(f"{a.id} and {b.id} were not made with equal settings")
    ours, theirs = (scores(registry, evaluation, split) for evaluation in (a, b))
    if ours.keys() != theirs.keys():
        raise NotComparable(f"{a.id} and {b.id} did not see the same rows")
    differences = paired(ours, theirs)
    if not differences:
        raise NotComparable(f"{a.id} and {b.id} have no row to which both have a score")
    mean = sum(differences) / len(differences)
    return Difference(difference=mean, interval=bootstrap(differences), rows=len(differences))


def paired(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> list[float]:
    """The difference of each row to which both have a score, in the order of the rows' ids."""
    pairs = [(ours[row], theirs[row]) for row in sorted(ours)]
    return [mine - other for mine, other in pairs if mine is not None and other is not None]


def scores(registry: Registry, evaluation: Artifact, split: Split) -> dict[str, float | None]:
    """Row -> mean score of its samples; None where no answer to it has a score. Raises BadInput when the files are no
    longer what was published."""
    if wrong := verify(registry, evaluation):
        raise BadInput(f"{wrong[0]}; run switchback verify {evaluation.id}, and evaluate the policy again")
    directory = registry.path(evaluation)
    said = read_evaluation(registry.path(evaluation, split)).per_row
    lines = [json.loads(line) for line in (directory / said).read_text(encoding="utf-8").splitlines()]
    return {line["row"]: mean_score(line) for line in lines}


def mean_score(line: dict[str, Any]) -> float | None:
    """Of a row's samples; one without a score counts as 0 where another answer to the row has one."""
    if all(one["score"] is None for one in (line["greedy"], *line["samples"])):
        return None
    return sum(one["score"] or 0.0 for one in line["samples"]) / len(line["samples"])


def bootstrap(values: list[float]) -> tuple[float, float]:
    """95 % percentile interval of a mean difference, resampling the values; the same for the same values. Where all
    are equal, by how many rows that says it."""
    if max(values) - min(values) < ROUNDING:
        return of_equal_differences(values[0], len(values))
    draw = random.Random(SEED)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    return means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]
