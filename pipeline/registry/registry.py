"""The registry: a directory per artifact, that `from_pretrained` loads; artifact.json is written last, so its existence means the artifact is whole.

    format.json
    artifacts/<stage>-<uuid8>/   files, artifact.json
    keys/<key>/<n>.json          who made this key: {artifact} or {void, reason}; append-only, the highest counts
    runs/<run>/                  recipe.yaml, plan.json, events/<n>.json

One writer ever; nothing is changed after. The registry is the only memory: what it does not have was not done.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from pipeline.identity import digest_file
from pipeline.registry.artifact import Artifact, File, now
from pipeline.registry.store import LocalStore, sync, sync_tree, write_through
from stages.job import MANIFEST, BadInput

FORMAT = {"format": 1, "hash": "sha256"}
SAFE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model")
"""Kinds of file an artifact may hold. No pickle, ever."""


class UnsafeFile(ValueError):
    """A file that must not be published."""


class Registry:
    """Artifacts under one root."""

    def __init__(self, root: Path) -> None:
        """Opens a registry, or an empty place that becomes one with the first thing published. Raises BadInput on a root that is a file, or of
        another format."""
        self.store = LocalStore(root)
        if (found := self.store.get("format.json")) not in (None, FORMAT):
            raise BadInput(
                f"registry: {root} has format {found}, this version of switchback reads {FORMAT}; use the version that wrote it"
            )

    @property
    def root(self) -> Path:
        """Absolute."""
        return self.store.root

    def path(self, artifact: Artifact, output: str | None = None) -> Path:
        """The artifact's directory, or where one of its outputs lies."""
        directory = self.store.path(f"artifacts/{artifact.id}")
        return directory / artifact.outputs[output] if output else directory

    def get(self, id: str) -> Artifact | None:
        """An artifact by id; None when it is not there or not whole."""
        found = self.store.get(f"artifacts/{id}/{MANIFEST}")
        return Artifact.model_validate(found) if found else None

    def open(self, id: str) -> Artifact:
        """An artifact by id. Raises BadInput when it is not there."""
        if artifact := self.get(id):
            return artifact
        raise BadInput(f"there is no artifact {id} in {self.root}; switchback ls shows what there is")

    def find(self, key: str) -> Artifact | None:
        """Who made this key; None when nobody did, or when what was made is gone or void."""
        log = f"keys/{key}"
        newest = self.store.get(f"{log}/{self.store.last(log):06d}.json") or {}
        return self.get(newest["artifact"]) if "artifact" in newest else None

    def artifacts(self) -> list[Artifact]:
        """All whole artifacts, oldest first."""
        found = (self.get(id) for id in self.store.names("artifacts"))
        return sorted(
            (artifact for artifact in found if artifact), key=lambda artifact: (artifact.created, artifact.id)
        )

    def publish(self, directory: Path, artifact: Artifact) -> Artifact:
        """Take a finished directory in, as this artifact with an id, date and files of its own; `directory` is gone afterwards.

        Whoever published the key first wins: the other's work is removed, and the winner's artifact is returned. Raises UnsafeFile for a file of a
        kind that must not be published, before anything is moved.
        """
        self.store.put_new("format.json", FORMAT)
        id = f"{artifact.stage}-{uuid.uuid4().hex[:8]}"
        whole = artifact.model_copy(update={"id": id, "created": now(), "files": list_files(directory)})
        sync_tree(directory)  # before there is a manifest that says so
        write_through(directory / MANIFEST, whole.model_dump_json(indent=1))
        sync(directory)
        path = self.store.adopt(directory, f"artifacts/{id}")
        winner = self._record(whole)
        if winner.id != id:
            (path / MANIFEST).unlink()  # first, so that what is left of it is never taken for whole
            shutil.rmtree(path)
        return winner

    def recover(self, key: str) -> Artifact | None:
        """Record a whole artifact whose maker was killed before it could write the key's first entry; None when there is none."""
        if self.store.last(f"keys/{key}"):
            return None
        found = next((artifact for artifact in self.artifacts() if artifact.key == key), None)
        return self._record(found) if found else None

    def void(self, artifact: Artifact, reason: str) -> None:
        """Say that a key's artifact must not be used any more, so that the step can be made again."""
        if self.find(artifact.key) == artifact:
            self.store.append(f"keys/{artifact.key}", {"void": artifact.id, "reason": reason})

    def _record(self, artifact: Artifact) -> Artifact:
        """Enter an artifact as the maker of its key; returns the one that was first."""
        log = f"keys/{artifact.key}"
        while (winner := self.find(artifact.key)) is None:
            self.store.put_new(f"{log}/{self.store.last(log) + 1:06d}.json", {"artifact": artifact.id})
        return winner


def list_files(directory: Path) -> tuple[File, ...]:
    """Every file below a directory with size and digest. Raises UnsafeFile on a link, or on a kind of file that is not allowed."""
    files: list[File] = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if path.is_symlink() or (path.is_file() and path.suffix not in SAFE_SUFFIXES):
            raise UnsafeFile(
                f"{relative} must not be published; artifacts hold {', '.join(SAFE_SUFFIXES)} and no links"
            )
        if path.is_file() and relative != MANIFEST:
            path.chmod(0o644)
            files.append(File(path=relative, size=path.stat().st_size, sha256=digest_file(path)))
    return tuple(files)
