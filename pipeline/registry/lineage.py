"""Where an artifact comes from: itself, then its inputs, down to the base model."""

from __future__ import annotations

from pipeline.registry.artifact import Artifact, Source
from pipeline.registry.registry import Registry
from stages.config import Frozen


class Ancestor(Frozen):
    """One node of the tree."""

    role: str
    """What it is to the artifact above it; "" at the top."""
    id: str | None
    """None for a base model that is no artifact."""
    name: str
    kind: str
    key: str
    whole: bool
    """False for an artifact that is gone, or is no longer the one that was read."""
    inputs: tuple[Ancestor, ...] = ()


def lineage(registry: Registry, artifact: Artifact, role: str = "") -> Ancestor:
    """The tree of an artifact."""
    inputs = tuple(_ancestor(registry, source, role) for role, source in artifact.inputs.items())
    return Ancestor(
        role=role, id=artifact.id, name=artifact.stage, kind=artifact.kind, key=artifact.key, whole=True, inputs=inputs
    )


def _ancestor(registry: Registry, source: Source, role: str) -> Ancestor:
    if source.id is None:
        return Ancestor(role=role, id=None, name=source.name, kind="base", key=source.key, whole=True)
    found = registry.get(source.id)
    if found and found.key == source.key:
        return lineage(registry, found, role)
    return Ancestor(role=role, id=source.id, name=source.name, kind="gone", key=source.key, whole=False)
