"""The registry: a directory per artifact, that `from_pretrained` loads. `artifact.json` is written last, so an artifact
that has one is complete.

    format.json
    artifacts/<stage>-<uuid8>/   files, artifact.json
    keys/<key>/<n>.json          log of a key: {artifact, manifest: its digest} or {void, reason}. Append-only: the
                                 newest entry about an artifact counts
    refs/<alias>/<n>.json        where an alias points (`aliases`)
    pins/<id>/<owner>.json       owners that still need an artifact (`pins`)
    tombstones/<id>.json         manifests of removed artifacts (`cleanup.gc`), so that lineage still explains them
    runs/<run>/                  recipe.yaml, plan.json, events/<n>.json (`runs`)

Every file has one writer and never changes. A step was done if, and only if, the registry holds its artifact.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline.errors import Unreadable
from pipeline.registry.artifact import Artifact, is_id, now, parse
from pipeline.registry.files import list_files
from pipeline.registry.stores.open import open_store
from stages.errors import BadInput, printable
from stages.job import MANIFEST
from stages.runtime.disk import write_through
from stages.visible import visible

FORMAT = {"format": 1, "hash": "sha256"}
LOG = logging.getLogger("switchback")
"""Artifacts left out of a list are named here: a line on stderr, unless logging is configured otherwise."""


class Published(NamedTuple):
    """The outcome of a publication."""

    artifact: Artifact
    """The one that counts for the key."""
    lost: Artifact | None
    """The caller's own artifact, where another process had made the key first; its files are gone."""


class Registry:
    """Artifacts under one root."""

    def __init__(self, place: str | Path) -> None:
        """Open a registry at a path or a URL, or an empty place that becomes one with the first publication. Raises
        BadInput for a registry of another format."""
        self.store = open_store(str(place))
        stored_format = self.store.get("format.json")
        if stored_format not in (None, FORMAT):
            raise BadInput(
                f"registry: {self.url} has another format (found {stored_format}, expected {FORMAT}). "
                "Fix: use the version of switchback that wrote it."
            )
        self._is_new = stored_format is None
        self._named = set[str]()

    @property
    def url(self) -> str:
        """The absolute path or the URL that opens this registry again."""
        return self.store.url

    def must_exist(self) -> None:
        """Raise BadInput where there is no registry, for commands that would find nothing wrong with an empty place."""
        if self._is_new:
            raise BadInput(f"there is no registry in {self.url}; give its directory or URL with --registry")

    def initialise(self) -> None:
        """Make an empty place a registry. Raises BadInput for a place that cannot be written, or that does not keep the
        promises of `Store`."""
        if self._is_new:
            self.store.probe()
            self.store.put_new("format.json", FORMAT)
            self._is_new = False

    def location(self, artifact: Artifact, output: str | None = None) -> str:
        """The path or URL of an artifact or of one of its outputs, for display."""
        place = f"{self.url}/artifacts/{artifact.id}"
        if not output or artifact.outputs[output] == ".":
            return place
        return f"{place}/{artifact.outputs[output]}"

    def path(self, artifact: Artifact, output: str | None = None) -> Path:
        """A local directory with the artifact, or the path of one of its outputs in it. An object store downloads the
        artifact first."""
        directory = self.store.fetch(f"artifacts/{artifact.id}", artifact.files, MANIFEST)
        return directory / artifact.outputs[output] if output else directory

    def content(self, artifact: Artifact, output: str, file: str) -> bytes | None:
        """A small file of one of its outputs, read where it is; None when there is none."""
        inside = PurePosixPath(artifact.outputs[output], file)
        return self.store.read(f"artifacts/{artifact.id}/{inside}")

    def get(self, artifact_id: str) -> Artifact | None:
        """An artifact by id; None when it is missing or incomplete. Raises BadInput when its manifest is invalid."""
        return self.read(artifact_id) if is_id(artifact_id) else None

    def open(self, artifact_id: str) -> Artifact:
        """An artifact by id. Raises BadInput when it is missing, or when its manifest is invalid."""
        artifact = self.get(artifact_id)
        if artifact is not None:
            return artifact
        if is_id(artifact_id) and self.store.read(f"tombstones/{artifact_id}.json"):
            raise BadInput(
                f"{artifact_id} was cleaned; switchback gc removed it from {self.url}, and its recipe makes it again"
            )
        raise BadInput(
            f"there is no artifact {printable(artifact_id)} in {self.url}; switchback ls shows what there is"
        )

    def find(self, key: str) -> Artifact | None:
        """The artifact that counts for a key; None when there is none, or when it is gone or void. Raises BadInput for
        an invalid log or manifest."""
        artifact_id = self.current(key)
        if artifact_id is None:
            return None
        artifact = self.get(artifact_id)
        if artifact is not None and artifact.key != key:
            raise BadInput(
                f"{artifact_id}/{MANIFEST} is of key {artifact.key[:12]}, but is recorded for {key[:12]}; "
                f"run switchback verify {artifact_id}"
            )
        return artifact

    def current(self, key: str) -> str | None:
        """Id of the newest artifact in a key's log that no later entry voids. Raises BadInput for an invalid log."""
        log = f"keys/{key}"
        void = set[str]()
        for number in range(self.store.last(log), 0, -1):
            entry = self.store.get(f"{log}/{number:06d}.json")
            artifact_id = recorded_artifact(entry, key, number)
            if artifact_id is None:
                void.add(entry["void"])
            elif artifact_id not in void:
                return artifact_id
        return None

    def artifacts(self, stage: str | None = None, strict: bool = False) -> list[Artifact]:
        """All complete artifacts, or those of one stage, oldest first. An artifact with an invalid manifest is left out
        and named in the log, so that it does not block the others. `strict` raises BadInput instead, for a caller that
        would take an unlisted artifact for a missing one."""
        names = self.store.names("artifacts")
        if stage is not None:
            names = [name for name in names if name.rpartition("-")[0] == stage]
        complete = [artifact for artifact in self._read_all(names, strict) if artifact is not None]
        return sorted(complete, key=lambda artifact: (artifact.created, artifact.id))

    def _read_all(self, names: Sequence[str], strict: bool) -> list[Artifact | None]:
        """Read many manifests at once; one by one where the store cannot read one of them."""
        try:
            manifests = self.store.read_each([f"artifacts/{name}/{MANIFEST}" for name in names])
        except BadInput:
            if strict:
                raise
            return [self._read_or_warn(name, self.read) for name in names]
        contents = dict(zip(names, manifests, strict=True))
        if strict:
            return [_parsed(name, contents[name]) for name in names]
        return [self._read_or_warn(name, lambda name: _parsed(name, contents[name])) for name in names]

    def read(self, name: str) -> Artifact | None:
        """The artifact in a directory of `artifacts/`, under any name; None without a manifest. Raises BadInput for an
        invalid manifest."""
        return _parsed(name, self.store.read(f"artifacts/{name}/{MANIFEST}"))

    def _read_or_warn(self, name: str, read: Callable[[str], Artifact | None]) -> Artifact | None:
        try:
            return read(name)
        except BadInput as error:
            if name not in self._named:
                self._named.add(name)
                LOG.warning("switchback: left out: %s", visible(str(error), keep=""))
            return None

    def publish(self, directory: Path, artifact: Artifact, owner: str) -> Published:
        """Move a finished directory in, as this artifact with a new id, date and list of files. `owner` holds a pin on
        the returned artifact until `release`.

        The first process to publish a key wins: the other's directory is removed, and the winner's artifact is
        returned. Raises UnsafeFile for a file that must not be published, before anything is moved.
        """
        self.initialise()
        artifact_id = f"{artifact.stage}-{uuid.uuid4().hex[:8]}"
        complete = artifact.model_copy(update={"id": artifact_id, "created": now(), "files": list_files(directory)})
        complete = Artifact.model_validate(complete.model_dump())
        write_through(directory / MANIFEST, complete.model_dump_json(indent=1).encode())
        self.pin(artifact_id, owner)
        self.store.take_in(directory, f"artifacts/{artifact_id}", MANIFEST)
        winner = self._record(complete, owner)
        if winner.id == artifact_id:
            return Published(complete, None)
        self.store.remove_tree(f"artifacts/{artifact_id}", MANIFEST)
        self.release(artifact_id, owner)
        return Published(winner, complete)

    def recover(self, key: str, stage: str, owner: str) -> Artifact | None:
        """Record a complete artifact whose process was killed before it wrote the log entry, and pin it; None when
        there is none."""
        if self.find(key):
            return None
        for artifact in self.artifacts(stage):
            if artifact.key == key and not self.entries_about(artifact):
                return self._recover(artifact, owner)
        return None

    def _recover(self, artifact: Artifact, owner: str) -> Artifact | None:
        self.pin(artifact.id, owner)
        if self.entries_about(artifact) and not self.usable(artifact):  # a clean-up was faster than the pin
            self.release(artifact.id, owner)
            return None
        winner = self._record(artifact, owner)
        if winner.id != artifact.id:
            self.release(artifact.id, owner)
        return winner

    def void(self, artifact: Artifact, reason: str) -> None:
        """Invalidate a key's artifact, so that the step can be made again."""
        if self._is_current(artifact):
            self.store.append(f"keys/{artifact.key}", {"void": artifact.id, "reason": reason})

    def hold(self, artifact: Artifact, owner: str) -> bool:
        """Pin an artifact before it is read; False, and no pin, when it is void or gone. A concurrent clean-up cannot
        remove a held artifact: `hold` writes the pin and then reads the log, and the clean-up writes the log and then
        reads the pins."""
        self.pin(artifact.id, owner)
        if self.usable(artifact):
            return True
        self.release(artifact.id, owner)
        return False

    def usable(self, artifact: Artifact) -> bool:
        """Whether an artifact is complete, and the newest entry about it in its key's log does not void it."""
        entries = self.entries_about(artifact)
        return bool(entries) and "artifact" in entries[-1] and self.get(artifact.id) is not None

    def entries_about(self, artifact: Artifact) -> list[dict[str, Any]]:
        """The entries about an artifact in its key's log, oldest first. Raises BadInput for an invalid log."""
        entries = self.store.entries(f"keys/{artifact.key}")
        for number, entry in enumerate(entries, 1):
            recorded_artifact(entry, artifact.key, number)
        return [entry for entry in entries if artifact.id in (entry.get("artifact"), entry.get("void"))]

    def pin(self, artifact_id: str, owner: str, reason: str = "") -> None:
        """Protect an artifact from clean-up for an owner: a run, as long as it lives, or `user`."""
        self.store.put_new(f"pins/{artifact_id}/{owner}.json", {"owner": owner, "reason": reason, "at": now()})

    def release(self, artifact_id: str, owner: str) -> None:
        """Remove an owner's pin."""
        self.store.remove(f"pins/{artifact_id}/{owner}.json")

    def _record(self, artifact: Artifact, owner: str) -> Artifact:
        """Enter an artifact, pinned by its owner, in its key's log. Returns the artifact that was first there, pinned
        by the owner too."""
        log = f"keys/{artifact.key}"
        while True:
            last = self.store.last(log)
            winner = self.find(artifact.key)
            if winner is not None:
                if self.hold(winner, owner):
                    return winner
            elif self.store.append_at(log, last + 1, {"artifact": artifact.id, "manifest": self._manifest(artifact)}):
                return artifact

    def _manifest(self, artifact: Artifact) -> str:
        """The digest of a manifest. The key's log records it, so that `verify` notices a changed manifest."""
        return self.store.digest(f"artifacts/{artifact.id}/{MANIFEST}")

    def _is_current(self, artifact: Artifact) -> bool:
        current = self.find(artifact.key)
        return current is not None and current.id == artifact.id


@contextmanager
def passed_over(lenient: bool = True) -> Iterator[None]:
    """In a list, a file that this user may not read is named in the log and left out, where `lenient`."""
    try:
        yield
    except Unreadable as error:
        if not lenient:
            raise
        LOG.warning("switchback: left out: %s", error)


def _parsed(name: str, content: bytes | None) -> Artifact | None:
    return None if content is None else parse(name, content)


def recorded_artifact(entry: Any, key: str, number: int) -> str | None:
    """The artifact that an entry of a key's log records; None for an entry that voids one. Raises BadInput for an
    invalid entry."""
    ids: dict[str, Any] = {}
    if isinstance(entry, dict):
        ids = {name: entry[name] for name in ("artifact", "void") if entry.get(name) is not None}
    valid = [value for value in ids.values() if isinstance(value, str) and is_id(value)]
    if len(ids) != 1 or not valid:
        raise BadInput(
            f"keys/{key}/{number:06d}.json is no entry of a key's log; switchback did not write it, so remove it"
        )
    return ids.get("artifact")
