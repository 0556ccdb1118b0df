"""The artifacts that clean-up must keep: targets of aliases and pins, their ancestors, and evaluations of the policies
among them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from pipeline.registry.aliases import aliases
from pipeline.registry.artifact import Artifact
from pipeline.registry.pins import counts, pins
from pipeline.registry.registry import Registry
from stages.evaluate import EVALUATE


def needed(
    registry: Registry, moment: datetime, spared: Callable[[Artifact], str | None]
) -> tuple[list[Artifact], dict[str, str]]:
    """(all artifacts, id -> why it is needed). `spared` gives a reason to keep an artifact without an alias or a pin,
    or None.

    Raises BadInput for an unreadable manifest, whose ancestors are unknown and would be removed. A command that sets an
    alias pins first and releases last, so pins are read before aliases. A publisher pins its inputs until it is done,
    so artifacts are read last.
    """
    why = {name: f"pinned by {pin.owner}" for name, pin in pins(registry) if counts(registry, pin, moment)}
    why |= {move.artifact: f"alias {alias}" for alias, move in aliases(registry).items() if move.artifact}
    artifacts = registry.artifacts(strict=True)
    for artifact in artifacts:
        reason = spared(artifact)
        if reason is not None:
            why.setdefault(artifact.id, reason)
    by_id = {artifact.id: artifact for artifact in artifacts}
    _with_lineage(by_id, why)
    _with_evaluations(artifacts, by_id, why)
    return artifacts, why


def _with_lineage(by_id: dict[str, Artifact], why: dict[str, str]) -> None:
    """Add the ancestors of the artifacts in `why`."""
    waiting = list(why)
    while waiting:
        artifact = by_id.get(waiting.pop())
        if artifact is None:
            continue
        for source in artifact.inputs.values():
            if source.id and source.id not in why:
                why[source.id] = f"{artifact.id} was made from it"
                waiting.append(source.id)


def _with_evaluations(artifacts: list[Artifact], by_id: dict[str, Artifact], why: dict[str, str]) -> None:
    """Add the evaluations of the policies in `why`, and of the base models among their inputs."""
    kept = [by_id[artifact_id] for artifact_id in why if artifact_id in by_id]
    bases = {source.key for artifact in kept for source in artifact.inputs.values() if source.id is None}
    for artifact in artifacts:
        policy = artifact.inputs.get("policy")
        if artifact.kind != EVALUATE or policy is None:
            continue
        if policy.id in why or (policy.id is None and policy.key in bases):
            why.setdefault(artifact.id, f"the evaluation of {policy.id or policy.name}")
