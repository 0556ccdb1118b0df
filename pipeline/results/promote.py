"""Promotion: an alias moves to another policy only when that one is not credibly worse.

two policies -> their evaluations on the same validation rows -> the mean difference, paired by row, with its interval
-> the move, or Refused

Validation decides; held-out rows are never looked at.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import NotComparable, Refused
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import Move, current, newest, set_to
from pipeline.results.evaluations import Difference, difference, of_policy, settings
from stages.errors import BadInput


class Comparison(Difference):
    """How a policy does against another one, on the same validation rows."""

    against: str
    """The other one's artifact."""

    def __str__(self) -> str:
        low, high = (f"{100 * end:+.1f}" for end in self.interval)
        return (
            f"{100 * self.difference:+.1f} points against {self.against} (95 % {low} to {high}, {self.rows} "
            f"validation rows)"
        )


def promote(registry: Registry, policy: Artifact, alias: str, reason: str = "", force: bool = False) -> Move:
    """Point an alias at a policy. Where it points at another one, the new one must not be credibly worse: Refused when
    the interval of the difference lies below 0, and when the two cannot be compared. `force` moves in any case, and
    the entry says so."""
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
            f"{alias} stays at {id}: {error}, so nothing says that {policy.id} is not worse; evaluate both alike, or "
            f"use --force"
        ) from None
    worse = found.interval[1] < 0
    if worse and not force:
        raise Refused(f"{alias} stays at {id}: {policy.id} is worse, {found}; --force moves it nevertheless")
    return {**found.model_dump(mode="json"), **({"forced": True} if worse else {})}


def compare(registry: Registry, policy: Artifact, other: Artifact) -> Comparison:
    """How a policy does against another. Raises NotComparable without evaluations of both with equal settings on the
    same rows."""
    ours, theirs = of_policy(registry, policy), of_policy(registry, other)
    for one, found in ((policy, ours), (other, theirs)):
        if not found:
            raise NotComparable(f"{one.id} has no evaluation")
    pair = next(((a, b) for a in ours for b in theirs if settings(a) == settings(b)), None)
    if pair is None:
        raise NotComparable(f"{policy.id} and {other.id} were not evaluated with equal settings")
    return Comparison(against=other.id, **dict(difference(registry, *pair, "validation")))
