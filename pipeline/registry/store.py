"""Where bytes live: a local directory. Everything above needs only these few promises, which an object store can keep too.

`put_new` is all or nothing and says whether it was first; nothing that was put is ever changed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from stages.job import BadInput


class LocalStore:
    """A directory of files that are written once."""

    def __init__(self, root: Path) -> None:
        """Raises BadInput when `root` cannot be a directory."""
        self.root = root.absolute()
        for parent in (self.root, *self.root.parents):
            if parent.exists() and not parent.is_dir():
                raise BadInput(
                    f"registry: {parent} is a file, so {self.root} cannot be a directory; choose another path"
                )

    def path(self, name: str) -> Path:
        """Where a name lies. Raises BadInput for one that would leave the root."""
        if not (path := (self.root / name).absolute()).is_relative_to(self.root) or ".." in Path(name).parts:
            raise BadInput(f"{name!r} leaves the registry {self.root}; give the id of a run or an artifact")
        return path

    def put_new(self, name: str, content: Any) -> bool:
        """Write JSON under a name that must not exist; False when it does."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        write_through(partial, json.dumps(content, indent=1))
        try:
            os.link(partial, path)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        sync(path.parent)
        return True

    def get(self, name: str) -> Any:
        """The JSON under a name; None when there is none."""
        try:
            return json.loads(self.path(name).read_text())
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        """What lies directly below a prefix, sorted; nothing that is still being written."""
        directory = self.path(prefix)
        return sorted(p.name for p in directory.iterdir() if not p.name.startswith(".")) if directory.is_dir() else []

    def append(self, log: str, content: Any) -> int:
        """Put the next entry <n>.json of an append-only log; returns n, from 1. Two writers get two numbers."""
        number = self.last(log)
        while not self.put_new(f"{log}/{(number := number + 1):06d}.json", content):
            pass
        return number

    def entries(self, log: str) -> list[Any]:
        """A log's entries, oldest first."""
        return [self.get(f"{log}/{name}") for name in self.names(log)]

    def last(self, log: str) -> int:
        """The number of a log's newest entry; 0 when it has none."""
        return max((int(name.removesuffix(".json")) for name in self.names(log)), default=0)

    def adopt(self, directory: Path, name: str) -> Path:
        """Move a finished directory in, under a name that must not exist; from another file system it is copied beside its place first."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise FileExistsError(path)
        try:
            directory.rename(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            partial = path.with_name(f".{path.name}")
            shutil.copytree(directory, partial)
            sync_tree(partial)
            partial.rename(path)
            shutil.rmtree(directory)
        sync(path.parent)
        return path


def write_through(path: Path, text: str) -> None:
    """Write and wait until the disk has it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until the disk has all files and entries below a directory."""
    for path in [directory, *directory.rglob("*")]:
        sync(path)
