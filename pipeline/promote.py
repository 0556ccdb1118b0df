"""Promotion: an alias moves to another policy only when that one is not credibly worse.

two policies -> their evaluations on the same validation rows -> the mean difference, paired by row, with its interval -> the move, or Refused

Validation decides; held-out rows are never looked at.
"""

from __future__ import annotations

import json
import random
from typing import Any

from pipeline.evaluations import of_policy, settings
from pipeline.refused import Refused
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import Move, current, newest, set_to
from pipeline.registry.verify import verify
from stages.config import Frozen
from stages.job import BadInput, read_evaluation

RESAMPLES, SEED = 2000, 0
"""Of the bootstrap."""


class Comparison(Frozen):
    """How a policy does against another one, on the same validation rows. Shares in 0..1."""

    against: str
    """The other one's artifact."""
    difference: float
    """Mean score of the samples, minus the other one's."""
    interval: tuple[float, float]
    """95 % of it: percentile bootstrap, resampling rows."""
    rows: int

    def __str__(self) -> str:
        low, high = (f"{100 * end:+.1f}" for end in self.interval)
        return f"{100 * self.difference:+.1f} points against {self.against} (95 % {low} to {high}, {self.rows} validation rows)"


class NotComparable(ValueError):
    """Two policies have no evaluations that can be compared; says why."""


def promote(registry: Registry, policy: Artifact, alias: str, reason: str = "", force: bool = False) -> Move:
    """Point an alias at a policy. Where it points at another one, the new one must not be credibly worse: Refused when the interval of the difference
    lies below 0, and when the two cannot be compared. `force` moves in any case, and the entry says so."""
    if "policy" not in policy.outputs:
        raise BadInput(f"{policy.id} is of kind {policy.kind} and holds no policy; give a policy")
    seen = newest(registry, alias)
    now = current(registry, alias)
    if now is None or now.artifact in (None, policy.id):
        return set_to(registry, alias, policy, expect=seen.number if seen else 0, reason=reason)
    evidence = _evidence(registry, policy, registry.get(now.artifact), now.artifact, alias, force)
    return set_to(registry, alias, policy, expect=now.number, reason=reason, evidence=evidence)


def _evidence(
    registry: Registry, policy: Artifact, other: Artifact | None, id: str, alias: str, force: bool
) -> dict[str, Any]:
    """What the entry remembers. Raises Refused."""
    try:
        if other is None:
            raise NotComparable(f"{id} is gone")
        found = compare(registry, policy, other)
    except NotComparable as error:
        if force:
            return {"forced": True, "why": str(error)}
        raise Refused(
            f"{alias} stays at {id}: {error}, so nothing says that {policy.id} is not worse; evaluate both alike, or use --force"
        ) from None
    worse = found.interval[1] < 0
    if worse and not force:
        raise Refused(f"{alias} stays at {id}: {policy.id} is worse, {found}; --force moves it nevertheless")
    return {**found.model_dump(mode="json"), **({"forced": True} if worse else {})}


def compare(registry: Registry, policy: Artifact, other: Artifact) -> Comparison:
    """How a policy does against another. Raises NotComparable without evaluations of both with equal settings on the same rows."""
    ours, theirs = of_policy(registry, policy), of_policy(registry, other)
    for one, found in ((policy, ours), (other, theirs)):
        if not found:
            raise NotComparable(f"{one.id} has no evaluation")
    pair = next(((a, b) for a in ours for b in theirs if settings(a) == settings(b)), None)
    if pair is None:
        raise NotComparable(f"{policy.id} and {other.id} were not evaluated with equal settings")
    a, b = (scores(registry, evaluation) for evaluation in pair)
    if a.keys() != b.keys():
        raise NotComparable(f"{policy.id} and {other.id} were not evaluated on the same rows")
    differences = [a[row] - b[row] for row in sorted(a)]
    mean = sum(differences) / len(differences)
    return Comparison(against=other.id, difference=mean, interval=bootstrap(differences), rows=len(differences))


def scores(registry: Registry, evaluation: Artifact) -> dict[str, float]:
    """Validation row -> mean score of its samples. Raises BadInput when the files are no longer what was published."""
    if wrong := verify(registry, evaluation):
        raise BadInput(f"{wrong[0]}; run switchback verify {evaluation.id}, and evaluate the policy again")
    directory = registry.path(evaluation)
    said = read_evaluation(registry.path(evaluation, "validation")).per_row
    lines = [json.loads(line) for line in (directory / said).read_text().splitlines()]
    return {line["row"]: sum(one["score"] for one in line["samples"]) / len(line["samples"]) for line in lines}


def bootstrap(values: list[float]) -> tuple[float, float]:
    """95 % percentile interval of a mean, resampling the values; the same for the same values."""
    draw = random.Random(SEED)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    return means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]
