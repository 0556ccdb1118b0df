"""Tombstones: the manifest of an artifact that garbage collection removed, so that lineage still explains what was made
from it."""

from __future__ import annotations

from pydantic import AwareDatetime

from pipeline.registry.artifact import Artifact
from pipeline.registry.registry import Registry
from pipeline.registry.stores.store import read_as
from stages.config import Frozen


class Tombstone(Frozen):
    """What is left of a cleaned artifact."""

    artifact: Artifact
    why: str
    at: AwareDatetime


def tombstone(registry: Registry, id: str) -> Tombstone | None:
    """What an artifact that was cleaned has been; None for any other id."""
    return read_as(registry.store, _tombstone(id), Tombstone)


def _tombstone(id: str) -> str:
    return f"tombstones/{id}.json"
