"""What the registry vouches for: an artifact, its files and where it comes from."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator

from pipeline.identity import key_of
from stages.config import Frozen
from stages.job import Format


def _inside(path: str) -> str:
    """A path that stays below where it starts. Thousands of manifests are read to list a registry, so this is done on the text."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the artifact")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]


class File(Frozen):
    """One file of an artifact."""

    path: InsidePath
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
    digest: str | None = None
    """Of the artifact's files as they were read (`Artifact.digest`); None for what is no artifact."""


class Artifact(Frozen):
    """A finished step. Nothing of it is ever changed."""

    id: str
    key: str
    kind: str
    stage: str
    created: str
    """UTC, ISO 8601."""
    outputs: dict[str, InsidePath]
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

    @property
    def digest(self) -> str:
        """SHA-256 of the names and digests of all files."""
        return key_of({file.path: file.sha256 for file in self.files})


def now() -> str:
    """UTC to the microsecond, so that sorting by it is sorting by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
