"""Where bytes live. A registry needs few promises of a place, and a local directory and an object store can both keep them.

`put` is all or nothing and says whether it was first; nothing that was put is ever changed; a directory is taken in whole, its manifest last. What
needs an order of its own (who made a key, where an alias points, what a run did) is an append-only log: entry n+1 is put where none may be.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from typing_extensions import override

from pipeline.registry.artifact import File
from stages.disk import sync, sync_tree, write_through
from stages.job import BadInput

JSON_LIMIT = 64 * 2**20
"""Bytes that a JSON file may have; a longer one is refused before it is parsed."""

PUT_BELOW = ("keys", "refs", "pins", "tombstones", "runs")
"""Where single files are put, besides the root itself; artifacts are taken in whole."""


class Store(ABC):
    """A tree of names, each put once. Names are relative and have `/` in them, whatever the place."""

    url: str
    """What a user would give to open the same place again: an absolute path, or a URL."""
    work: Path
    """Where work in progress lies, unless the user says otherwise: always a local directory."""

    @abstractmethod
    def probe(self) -> None:
        """Raise BadInput for a place that cannot be written, or that does not keep these promises."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> bool:
        """Write under a name that must not exist, all or nothing; False when it does."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The bytes under a name; None when there are none. Raises BadInput when they are more than JSON_LIMIT."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """What lies directly below a prefix, sorted; nothing that is still being written."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take one name away; one that is gone already is fine. Logs and artifacts are never touched by it."""

    @abstractmethod
    def take_in(self, directory: Path, name: str, manifest: str) -> None:
        """Move a finished directory in, under a name that must not exist. Whoever sees its `manifest` sees all of it; `directory` is gone afterwards."""

    @abstractmethod
    def fetch(self, name: str, files: Sequence[File]) -> Path:
        """A local directory with these files of a directory of the store. What is fetched from elsewhere is verified; what is local already is not."""

    @abstractmethod
    def remove_tree(self, name: str, manifest: str) -> None:
        """Take a directory away, its manifest first, so that what is left of it is never taken for whole. One that is gone already is fine."""

    @abstractmethod
    def abandoned(self, prefix: str, manifest: str) -> list[str]:
        """Directories below a prefix that have no manifest and that nobody is still writing."""

    def leftovers(self, before: datetime) -> list[str]:
        """Names that puts which were killed before a moment have left, to be removed; none where a put leaves nothing."""
        return []

    def weight(self, name: str) -> int | None:
        """Bytes below a name; None where a place cannot tell."""
        return None

    def put_new(self, name: str, content: Any) -> bool:
        """`put` of JSON."""
        return self.put(name, json.dumps(content, indent=1).encode())

    def get(self, name: str) -> Any:
        """The JSON under a name; None when there is none. Raises BadInput when it is no JSON."""
        if (content := self.read(name)) is None:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise BadInput(f"{self.url}/{name} is no JSON; it was not written by switchback, so remove it") from None

    def append(self, log: str, content: Any) -> int:
        """Put the next entry <n>.json of an append-only log; returns n, from 1. Two writers get two numbers."""
        number = self.last(log) + 1
        while not self.append_at(log, number, content):
            number += 1
        return number

    def append_at(self, log: str, number: int, content: Any) -> bool:
        """Put entry `number` of a log; False when somebody else has put it. With `last() + 1` this is a compare-and-swap."""
        return self.put_new(f"{log}/{number:06d}.json", content)

    def entries(self, log: str) -> list[Any]:
        """A log's entries, oldest first."""
        return [self.get(f"{log}/{name}") for name in self.names(log)]

    def last(self, log: str) -> int:
        """The number of a log's newest entry; 0 when it has none. Raises BadInput on a name that is no number."""
        return max((self._number(log, name) for name in self.names(log)), default=0)

    def newest(self, log: str) -> tuple[int, Any]:
        """(number, content) of a log's newest entry; (0, None) when it has none."""
        number = self.last(log)
        return number, self.get(f"{log}/{number:06d}.json") if number else None

    def _number(self, log: str, name: str) -> int:
        stem = name.removesuffix(".json")
        if not (stem.isascii() and stem.isdigit() and 6 <= len(stem) <= 18):
            raise BadInput(
                f"{self.url}/{log}/{name} is no entry of a log; it was not written by switchback, so remove it"
            )
        return int(stem)


def inside(name: str) -> str:
    """A name that stays below its root. Raises BadInput for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise BadInput(f"{name!r} leaves the registry; give the id of a run or an artifact")
    return str(path)


class LocalStore(Store):
    """A directory of files that are written once."""

    def __init__(self, root: Path) -> None:
        """Raises BadInput when `root` cannot be a directory."""
        self.root = root.absolute()
        self.url, self.work = str(self.root), self.root / "work"
        for parent in (self.root, *self.root.parents):
            if parent.exists() and not parent.is_dir():
                raise BadInput(
                    f"registry: {parent} is a file, so {self.root} cannot be a directory; choose another path"
                )

    def path(self, name: str) -> Path:
        """Where a name lies. Raises BadInput for one that would leave the root."""
        return self.root / inside(name)

    @override
    def probe(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise BadInput(
                f"registry: {self.root} cannot be written: {error.strerror}; choose another directory"
            ) from None

    @override
    def put(self, name: str, content: bytes) -> bool:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            write_through(partial, content)
            os.link(partial, path)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)
        return True

    @override
    def read(self, name: str) -> bytes | None:
        try:
            with self.path(name).open("rb") as file:
                content = file.read(JSON_LIMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            raise BadInput(f"{self.url}/{name} is a directory, where a file was expected") from None
        if len(content) > JSON_LIMIT:
            raise BadInput(f"{self.url}/{name} has more than {JSON_LIMIT} bytes; it was not written by switchback")
        return content

    @override
    def names(self, prefix: str) -> list[str]:
        directory = self.path(prefix)
        return sorted(path.name for path in directory.iterdir() if path.name[0] != ".") if directory.is_dir() else []

    @override
    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    @override
    def take_in(self, directory: Path, name: str, manifest: str) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise FileExistsError(path)
        sync_tree(directory)
        try:
            directory.rename(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with _held(path.with_name(f".{path.name}")) as partial:
                try:
                    shutil.copytree(directory, partial, dirs_exist_ok=True)
                    sync_tree(partial)
                    partial.rename(path)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
                    raise
            shutil.rmtree(directory)
        sync(path.parent)

    @override
    def fetch(self, name: str, files: Sequence[File]) -> Path:
        return self.path(name)

    @override
    def remove_tree(self, name: str, manifest: str) -> None:
        path = self.path(name)
        with _seized(path) as seized:
            if seized:
                (path / manifest).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    @override
    def abandoned(self, prefix: str, manifest: str) -> list[str]:
        directory = self.path(prefix)
        found = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
        return [
            f"{prefix}/{path.name}"
            for path in found
            if not (path / manifest).exists() or path.name[0] == "."
            if _free(path)
        ]

    @override
    def leftovers(self, before: datetime) -> list[str]:
        inner = (path for top in PUT_BELOW for path in self.path(top).rglob(".*"))
        partials = (path for path in (*self.root.glob(".*"), *inner) if path.is_file())
        return sorted(str(path.relative_to(self.root)) for path in partials if _changed(path) < before.timestamp())

    @override
    def weight(self, name: str) -> int | None:
        path = self.path(name)
        files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
        return sum(file.lstat().st_size for file in files)


@contextmanager
def _held(directory: Path) -> Iterator[Path]:
    """A new directory that is locked as long as this block lasts; the kernel frees it whatever ends its holder."""
    while True:
        directory.mkdir(exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if directory.exists() and directory.stat().st_ino == os.fstat(descriptor).st_ino:
                yield directory
                return
        finally:
            os.close(descriptor)


@contextmanager
def _seized(directory: Path) -> Iterator[bool]:
    """Whether this block holds a directory's lock; False when somebody else does, or when the directory is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _free(directory: Path) -> bool:
    """Whether a directory is there and nobody holds its lock."""
    with _seized(directory) as held:
        return held


def _changed(path: Path) -> float:
    """When a file was last written, in seconds since 1970; for one that is gone, now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
