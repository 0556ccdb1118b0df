"""The registry: a directory per artifact, that `from_pretrained` loads; artifact.json is written last, so its existence means the artifact is whole.

    format.json
    artifacts/<stage>-<uuid8>/   files, artifact.json
    keys/<key>/<n>.json          who made this key: {artifact} or {void, reason}; append-only, the newest about an artifact counts
    refs/<alias>/<n>.json        where an alias points (`aliases`)
    pins/<id>/<owner>.json       who must not lose an artifact
    tombstones/<id>.json         what was cleaned (`gc`), so that lineage still explains it
    runs/<run>/                  recipe.yaml, plan.json, events/<n>.json (`runs`)

One writer ever; nothing is changed after. The registry is the only memory: what it does not have was not done.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from pipeline.registry.artifact import Artifact, now
from pipeline.registry.files import list_files
from pipeline.registry.places import open_store
from pipeline.registry.store import inside
from stages.disk import write_through
from stages.job import MANIFEST, BadInput

FORMAT = {"format": 1, "hash": "sha256"}


class Published(NamedTuple):
    """What came of a publication."""

    artifact: Artifact
    """The one that counts for the key."""
    lost: Artifact | None
    """What was handed in, where somebody else had made the key first; its files are gone."""


class Registry:
    """Artifacts under one root."""

    def __init__(self, place: str | Path) -> None:
        """Opens a registry at a path or a URL, or an empty place that becomes one with the first thing put there. Raises BadInput for one of
        another format."""
        self.store = open_store(str(place))
        if (found := self.store.get("format.json")) not in (None, FORMAT):
            raise BadInput(
                f"registry: {self.url} has format {found}, this version of switchback reads {FORMAT}; use the version that wrote it"
            )
        self._is_new = found is None

    @property
    def url(self) -> str:
        """What a user gives to open it: an absolute path, or a URL."""
        return self.store.url

    def initialise(self) -> None:
        """Make an empty place a registry. Raises BadInput for one that cannot be written, or that does not keep what a registry needs."""
        if self._is_new:
            self.store.probe()
            self.store.put_new("format.json", FORMAT)
            self._is_new = False

    def location(self, artifact: Artifact, output: str | None = None) -> str:
        """Where an artifact or one of its outputs lies, to be shown: a path, or a URL."""
        inner = f"/{artifact.outputs[output]}" if output and artifact.outputs[output] != "." else ""
        return f"{self.url}/artifacts/{artifact.id}{inner}"

    def path(self, artifact: Artifact, output: str | None = None) -> Path:
        """A local directory with the artifact, or where in it one of its outputs lies; from an object store it is fetched first."""
        directory = self.store.fetch(f"artifacts/{artifact.id}", artifact.files)
        return directory / artifact.outputs[output] if output else directory

    def get(self, id: str) -> Artifact | None:
        """An artifact by id; None when it is not there or not whole. Raises BadInput when its manifest is not one."""
        content = self.store.read(f"artifacts/{inside(id)}/{MANIFEST}")
        if content is None:
            return None
        try:
            artifact = Artifact.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise BadInput(
                f"{id}/{MANIFEST} is no manifest: {where}: {first['msg']}; switchback did not write it"
            ) from None
        if artifact.id != id:
            raise BadInput(f"{id}/{MANIFEST} is the manifest of {artifact.id!r}; switchback did not write it")
        return artifact

    def open(self, id: str) -> Artifact:
        """An artifact by id. Raises BadInput when it is not there."""
        if artifact := self.get(id):
            return artifact
        raise BadInput(f"there is no artifact {id} in {self.url}; switchback ls shows what there is")

    def find(self, key: str) -> Artifact | None:
        """Who made this key: the newest that was not said to be void since; None when nobody did, or when what was made is gone or void."""
        log, void = f"keys/{key}", set[str]()
        for name in reversed(self.store.names(log)):
            entry = self.store.get(f"{log}/{name}")
            said = entry if isinstance(entry, dict) else {}
            id = said.get("artifact")
            if isinstance(id, str) and id not in void:
                return self.get(id)
            void.add(str(said.get("void")))
        return None

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """All whole artifacts, or those of one stage, oldest first."""
        ids = [id for id in self.store.names("artifacts") if stage is None or id.rpartition("-")[0] == stage]
        found = (self.get(id) for id in ids)
        return sorted(
            (artifact for artifact in found if artifact), key=lambda artifact: (artifact.created, artifact.id)
        )

    def publish(self, directory: Path, artifact: Artifact, owner: str) -> Published:
        """Take a finished directory in, as this artifact with an id, date and files of its own; `directory` is gone afterwards. `owner` holds what is
        returned, until it lets go (`release`).

        Whoever published the key first wins: the other's work is removed, and the winner's artifact is returned. Raises UnsafeFile for a file that must
        not be published, before anything is moved.
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
        """Record a stage's whole artifact whose maker was killed before it could write the key's first entry, and hold it; None when there is none."""
        if self.store.last(f"keys/{key}"):
            return None
        for found in self.artifacts(stage):
            if found.key == key:
                self.pin(found.id, owner)
                if self.store.last(f"keys/{key}") and not self.find(key):  # a clean-up was faster than the pin
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
        """Pin an artifact that is about to be read; False, and no pin, when it is void or gone. Against a clean-up that runs beside it this is safe: the
        pin is put before the log is read again, and the clean-up writes the log before it reads the pins again."""
        self.pin(artifact.id, owner)
        if self.usable(artifact):
            return True
        self.release(artifact.id, owner)
        return False

    def usable(self, artifact: Artifact) -> bool:
        """Whether an artifact is whole, and the last word on it in its key's log is not that it is void."""
        about = [entry for entry in self.store.entries(f"keys/{artifact.key}") if artifact.id in entry.values()]
        return bool(about) and "artifact" in about[-1] and self.get(artifact.id) is not None

    def pin(self, id: str, owner: str, reason: str = "") -> None:
        """Keep an artifact from being cleaned, for an owner: a run, as long as it lives, or `user`."""
        self.store.put_new(f"pins/{id}/{owner}.json", {"owner": owner, "reason": reason, "at": now()})

    def release(self, id: str, owner: str) -> None:
        """Let go of an artifact."""
        self.store.remove(f"pins/{id}/{owner}.json")

    def _record(self, artifact: Artifact, owner: str) -> Artifact:
        """Enter an artifact, which its owner has pinned, as the maker of its key; returns the one that was first, held by the owner."""
        log = f"keys/{artifact.key}"
        while True:
            last = self.store.last(log)
            if winner := self.find(artifact.key):
                if self.hold(winner, owner):
                    return winner
            elif self.store.append_at(log, last + 1, {"artifact": artifact.id}):
                return artifact

    def _is_current(self, artifact: Artifact) -> bool:
        found = self.find(artifact.key)
        return found is not None and found.id == artifact.id
