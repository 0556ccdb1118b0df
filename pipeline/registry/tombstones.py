"""Tombstones: manifests of artifacts that garbage collection removed, so that lineage still explains them."""

from __future__ import annotations

from pydantic import AwareDatetime

from pipeline.registry.artifact import Artifact
from pipeline.registry.registry import Registry
from pipeline.registry.stores.store import read_as
from stages.config import Frozen


class Tombstone(Frozen):
    """The record of a removed artifact."""

    artifact: Artifact
    why: str
    at: AwareDatetime


def tombstone(registry: Registry, artifact_id: str) -> Tombstone | None:
    """The tombstone of a removed artifact; None for any other id."""
    return read_as(registry.store, tombstone_name(artifact_id), Tombstone)


def tombstone_name(artifact_id: str) -> str:
    """The name in the store of an artifact's tombstone."""
    return f"tombstones/{artifact_id}.json"
