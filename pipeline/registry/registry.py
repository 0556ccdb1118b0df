"""The registry: a directory per artifact, that `from_pretrained` loads; artifact.json is written last, so its existence
means the artifact is whole.

    format.json
    artifacts/<stage>-<uuid8>/   files, artifact.json
    keys/<key>/<n>.json          who made this key: {artifact, manifest: its digest} or {void, reason}; append-only, the newest about an artifact counts
    refs/<alias>/<n>.json        where an alias points (`aliases`)
    pins/<id>/<owner>.json       who must not lose an artifact
    tombstones/<id>.json         what was cleaned (`gc`), so that lineage still explains it
    runs/<run>/                  recipe.yaml, plan.json, events/<n>.json (`runs`)

One writer ever; nothing is changed after. The registry is the only memory: what it does not have was not done.
"""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.registry.artifact import Artifact, is_id, now, parse
from pipeline.registry.files import list_files
from pipeline.registry.stores.open import open_store
from stages.errors import BadInput, printable
from stages.job import MANIFEST
from stages.runtime.disk import write_through

FORMAT = {"format": 1, "hash": "sha256"}
LOG = logging.getLogger("switchback")
"""What is left out of a list is said here; a line on stderr, unless somebody configures it."""


class Published(NamedTuple):
    """What came of a publication."""

    artifact: Artifact
    """The one that counts for the key."""
    lost: Artifact | None
    """What was handed in, where somebody else had made the key first; its files are gone."""


class Registry:
    """Artifacts under one root."""

    def __init__(self, place: str | Path) -> None:
        """Opens a registry at a path or a URL, or an empty place that becomes one with the first thing put there.
        Raises BadInput for one of another format."""
        self.store = open_store(str(place))
        if (found := self.store.get("format.json")) not in (None, FORMAT):
            raise BadInput(
                f"registry: {self.url} has format {found}, this version of switchback reads {FORMAT}; use the version "
                "that wrote it"
            )
        self._is_new = found is None
        self._named = set[str]()

    @property
    def url(self) -> str:
        """What a user gives to open it: an absolute path, or a URL."""
        return self.store.url

    def must_exist(self) -> None:
        """Raise BadInput where there is no registry, for commands that would find nothing wrong with an empty place."""
        if self._is_new:
            raise BadInput(f"there is no registry in {self.url}; give its directory or URL with --registry")

    def initialise(self) -> None:
        """Make an empty place a registry. Raises BadInput for one that cannot be written, or that does not keep what a
        registry needs."""
        if self._is_new:
            self.store.probe()
            self.store.put_new("format.json", FORMAT)
            self._is_new = False

    def location(self, artifact: Artifact, output: str | None = None) -> str:
        """Where an artifact or one of its outputs lies, to be shown: a path, or a URL."""
        inner = f"/{artifact.outputs[output]}" if output and artifact.outputs[output] != "." else ""
        return f"{self.url}/artifacts/{artifact.id}{inner}"

    def path(self, artifact: Artifact, output: str | None = None) -> Path:
        """A local directory with the artifact, or where in it one of its outputs lies; from an object store it is
        fetched first."""
        directory = self.store.fetch(f"artifacts/{artifact.id}", artifact.files, MANIFEST)
        return directory / artifact.outputs[output] if output else directory

    def get(self, id: str) -> Artifact | None:
        """An artifact by id; None when it is not there or not whole. Raises BadInput when its manifest is not one."""
        return self.read(id) if is_id(id) else None

    def open(self, id: str) -> Artifact:
        """An artifact by id. Raises BadInput when it is not there, or when its manifest is not one."""
        if artifact := self.get(id):
            return artifact
        if is_id(id) and self.store.read(f"tombstones/{id}.json"):
            raise BadInput(f"{id} was cleaned; switchback gc removed it from {self.url}, and its recipe makes it again")
        raise BadInput(f"there is no artifact {printable(id)} in {self.url}; switchback ls shows what there is")

    def find(self, key: str) -> Artifact | None:
        """Who made this key; None when nobody did, or when what was made is gone or void. Raises BadInput for a log or
        a manifest that is not one."""
        id = self.current(key)
        found = self.get(id) if id else None
        if found and found.key != key:
            raise BadInput(
                f"{id}/{MANIFEST} is of key {found.key[:12]}, but is recorded for {key[:12]}; run switchback verify "
                f"{id}"
            )
        return found

    def current(self, key: str) -> str | None:
        """Id of the newest artifact in a key's log that was not said to be void since. Raises BadInput for a log with
        anything else in it."""
        log, void = f"keys/{key}", set[str]()
        for number in range(self.store.last(log), 0, -1):
            entry = self.store.get(f"{log}/{number:06d}.json")
            if (id := maker(entry, key, number)) is None:
                void.add(entry["void"])
            elif id not in void:
                return id
        return None

    def artifacts(self, stage: str | None = None, strict: bool = False) -> list[Artifact]:
        """All whole artifacts, or those of one stage, oldest first. One whose manifest is not one is left out, and said
        so in the log: somebody's bad artifact must not keep others from being used. `strict`: BadInput is raised
        instead, for who takes what is not listed for gone."""
        names = [name for name in self.store.names("artifacts") if stage is None or name.rpartition("-")[0] == stage]
        with unswept():
            found = self._all(names, strict)
        return sorted(
            (artifact for artifact in found if artifact), key=lambda artifact: (artifact.created, artifact.id)
        )

    def _all(self, names: Sequence[str], strict: bool) -> list[Artifact | None]:
        """Many at once, as the store likes best; one by one where one of them cannot be read."""
        try:
            contents = self.store.read_each([f"artifacts/{name}/{MANIFEST}" for name in names])
        except BadInput:
            if strict:
                raise
            return [self._readable(name, self.read) for name in names]
        there = dict(zip(names, contents, strict=True))
        if strict:
            return [_parsed(name, there[name]) for name in names]
        return [self._readable(name, lambda name: _parsed(name, there[name])) for name in names]

    def read(self, name: str) -> Artifact | None:
        """What lies in a directory of the store's `artifacts`, whatever it is called; None without a manifest. Raises
        BadInput when that is not one."""
        return _parsed(name, self.store.read(f"artifacts/{name}/{MANIFEST}"))

    def _readable(self, name: str, read: Callable[[str], Artifact | None]) -> Artifact | None:
        try:
            return read(name)
        except BadInput as error:
            if name not in self._named:
                self._named.add(name)
                LOG.warning("switchback: left out: %s", error)
            return None

    def publish(self, directory: Path, artifact: Artifact, owner: str) -> Published:
        """Take a finished directory in, as this artifact with an id, date and files of its own; `directory` is gone
        afterwards. `owner` holds what is returned, until it lets go (`release`).

        Whoever published the key first wins: the other's work is removed, and the winner's artifact is returned. Raises
        UnsafeFile for a file that must not be published, before anything is moved.
        """
        self.initialise()
        id = f"{artifact.stage}-{uuid.uuid4().hex[:8]}"
        whole = artifact.model_copy(update={"id": id, "created": now(), "files": list_files(directory)})
        whole = Artifact.model_validate(whole.model_dump())
        write_through(directory / MANIFEST, whole.model_dump_json(indent=1).encode())
        self.pin(id, owner)
        self.store.take_in(directory, f"artifacts/{id}", MANIFEST)
        winner = self._record(whole, owner)
        if winner.id == id:
            return Published(whole, None)
        self.store.remove_tree(f"artifacts/{id}", MANIFEST)
        self.release(id, owner)
        return Published(winner, whole)

    def recover(self, key: str, stage: str, owner: str) -> Artifact | None:
        """Record a stage's whole artifact whose maker was killed before it could write an entry of it, and hold it;
        None when there is none."""
        if self.find(key):
            return None
        for found in self.artifacts(stage):
            if found.key == key and not self.entries_about(found):
                self.pin(found.id, owner)
                if self.entries_about(found) and not self.usable(found):  # a clean-up was faster than the pin
                    self.release(found.id, owner)
                    return None
                winner = self._record(found, owner)
                if winner.id != found.id:
                    self.release(found.id, owner)
                return winner
        return None

    def void(self, artifact: Artifact, reason: str) -> None:
        """Say that a key's artifact must not be used any more, so that the step can be made again."""
        if self._is_current(artifact):
            self.store.append(f"keys/{artifact.key}", {"void": artifact.id, "reason": reason})

    def hold(self, artifact: Artifact, owner: str) -> bool:
        """Pin an artifact that is about to be read; False, and no pin, when it is void or gone. Against a clean-up that
        runs beside it this is safe: the pin is put before the log is read again, and the clean-up writes the log before
        it reads the pins again."""
        self.pin(artifact.id, owner)
        if self.usable(artifact):
            return True
        self.release(artifact.id, owner)
        return False

    def usable(self, artifact: Artifact) -> bool:
        """Whether an artifact is whole, and the last word on it in its key's log is not that it is void."""
        about = self.entries_about(artifact)
        return bool(about) and "artifact" in about[-1] and self.get(artifact.id) is not None

    def entries_about(self, artifact: Artifact) -> list[dict[str, Any]]:
        """What the log of its key says of an artifact, oldest first. Raises BadInput for a log with anything else in
        it."""
        entries = self.store.entries(f"keys/{artifact.key}")
        for number, entry in enumerate(entries, 1):
            maker(entry, artifact.key, number)
        return [entry for entry in entries if artifact.id in (entry.get("artifact"), entry.get("void"))]

    def pin(self, id: str, owner: str, reason: str = "") -> None:
        """Keep an artifact from being cleaned, for an owner: a run, as long as it lives, or `user`."""
        self.store.put_new(f"pins/{id}/{owner}.json", {"owner": owner, "reason": reason, "at": now()})

    def release(self, id: str, owner: str) -> None:
        """Let go of an artifact."""
        self.store.remove(f"pins/{id}/{owner}.json")

    def _record(self, artifact: Artifact, owner: str) -> Artifact:
        """Enter an artifact, which its owner has pinned, as the maker of its key; returns the one that was first, held
        by the owner."""
        log = f"keys/{artifact.key}"
        while True:
            last = self.store.last(log)
            if winner := self.find(artifact.key):
                if self.hold(winner, owner):
                    return winner
            elif self.store.append_at(log, last + 1, {"artifact": artifact.id, "manifest": self._manifest(artifact)}):
                return artifact

    def _manifest(self, artifact: Artifact) -> str:
        """The digest of a manifest, which vouches for everything else and is vouched for by its key's log."""
        return self.store.digest(f"artifacts/{artifact.id}/{MANIFEST}")

    def _is_current(self, artifact: Artifact) -> bool:
        found = self.find(artifact.key)
        return found is not None and found.id == artifact.id


def _parsed(name: str, content: bytes | None) -> Artifact | None:
    return None if content is None else parse(name, content)


def maker(entry: Any, key: str, number: int) -> str | None:
    """The artifact that an entry of a key's log names as its maker; None where it says that one is void. Raises
    BadInput for what is no entry."""
    said = {name: entry.get(name) for name in ("artifact", "void")} if isinstance(entry, dict) else {}
    ids = [id for id in said.values() if id is not None]
    if len(ids) != 1 or not isinstance(ids[0], str) or not is_id(ids[0]):
        raise BadInput(
            f"keys/{key}/{number:06d}.json is no entry of a key's log; switchback did not write it, so remove it"
        )
    return said["artifact"]


@contextmanager
def unswept() -> Iterator[None]:
    """Without the garbage collector, now and for what is read here: thousands of manifests hold no garbage, and to look
    for it takes as long as to read them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
