"""What the registry vouches for: an artifact, its files and where it comes from."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from stages.config import Frozen
from stages.job import Format

MANIFEST = "artifact.json"
"""Written last: its existence means the artifact is whole."""


class File(Frozen):
    """One file of an artifact."""

    path: str
    """Relative to the artifact."""
    size: int
    """Bytes."""
    sha256: str


class Source(Frozen):
    """What an input was."""

    id: str | None
    """The artifact; None for a base model that is not one."""
    output: str
    key: str
    """The artifact's key, or the base model's."""
    name: str
    """The stage that made it, or where the base model is from."""


class Artifact(Frozen):
    """A finished step. Nothing of it is ever changed."""

    id: str
    key: str
    kind: str
    stage: str
    created: str
    """UTC, ISO 8601."""
    outputs: dict[str, str]
    """Name -> path relative to the artifact; a policy is "."."""
    files: tuple[File, ...]
    inputs: dict[str, Source]
    format: Format | None
    config: dict[str, Any]
    """Everything the stage was told, execution included."""
    identity: dict[str, Any]
    """What was hashed into the key."""
    metrics: dict[str, float]
    provenance: dict[str, Any]
    """Run, host, versions, execution as it was seen."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def now() -> str:
    """UTC to the microsecond, so that sorting by it is sorting by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
