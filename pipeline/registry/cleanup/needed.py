"""What must not be cleaned: what aliases, users and live runs point at, what those were made from, and the evaluations
of the policies among them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from pipeline.registry.aliases import aliases
from pipeline.registry.artifact import Artifact
from pipeline.registry.pins import counts, pins
from pipeline.registry.registry import Registry


def needed(
    registry: Registry, moment: datetime, spared: Callable[[Artifact], str | None]
) -> tuple[list[Artifact], dict[str, str]]:
    """(all artifacts, id -> why it is needed). `spared` says why an artifact is needed that nobody points at; None
    where it is not.

    Raises BadInput for a manifest that cannot be read: what it was made from could not be known, and would go. Who sets
    an alias pins first and lets go last, so pins are read before aliases; who publishes holds what was read until then,
    so artifacts are read last.
    """
    why = {id: f"pinned by {pin.owner}" for id, pin in pins(registry) if counts(registry, pin, moment)}
    why |= {move.artifact: f"alias {alias}" for alias, move in aliases(registry).items() if move.artifact}
    artifacts = registry.artifacts(strict=True)
    for one in artifacts:
        if said := spared(one):
            why.setdefault(one.id, said)
    by_id = {one.id: one for one in artifacts}
    _with_lineage(by_id, why)
    _with_evaluations(artifacts, by_id, why)
    return artifacts, why


def _with_lineage(by_id: dict[str, Artifact], why: dict[str, str]) -> None:
    """Add all that the artifacts in `why` were made from."""
    grown = list(why)
    while grown:
        found = by_id.get(grown.pop())
        for source in found.inputs.values() if found else ():
            if source.id and source.id not in why:
                why[source.id] = f"{found.id if found else ''} was made from it"
                grown.append(source.id)


def _with_evaluations(artifacts: list[Artifact], by_id: dict[str, Artifact], why: dict[str, str]) -> None:
    """Add the evaluations of the policies in `why`, and of base models that they come from."""
    bases = {source.key for id in why if id in by_id for source in by_id[id].inputs.values() if source.id is None}
    for one in artifacts:
        policy = one.inputs.get("policy")
        if one.kind == "evaluate" and policy and (policy.id in why or (policy.id is None and policy.key in bases)):
            why.setdefault(one.id, f"the evaluation of {policy.id or policy.name}")
