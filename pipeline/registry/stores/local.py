"""A store in a local directory: files that are written once, by links and renames.

`put` links a finished file to its name, which fails when the name is taken. `take_in` renames a finished directory.
From another file system it copies the directory first, under a lock that the kernel frees when its holder ends.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from typing_extensions import override

from pipeline.errors import Damaged, Unreadable
from pipeline.registry.stores.store import JSON_LIMIT, PART, Stopped, Store, inside, never
from stages.errors import BadInput, printable
from stages.runtime import locks
from stages.runtime.disk import (
    HashedFile,
    digest_file,
    make_directory,
    share,
    share_tree,
    sync,
    sync_tree,
    write_through,
)

NO_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENAMETOOLONG)
"""Errors on opening a link, a socket, a directory or an impossible name."""
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors on linking a file of one's own, where the file system has no hard links: vfat, SMB, gcsfuse."""
PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}")
"""Name of a file while it is put."""
PUT_BELOW = ("keys", "refs", "pins", "tombstones", "runs")
"""Directories for single files, besides the root itself; `artifacts` takes directories."""


class LocalStore(Store):
    """A directory of files that are written once."""

    verifies = False

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
        """The path of a name. Raises BadInput for one that would leave the root."""
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
        make_directory(path.parent, self.root)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            write_through(partial, content)
            share(partial, self.root)
            self._link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)
        return True

    def _link(self, partial: Path, path: Path) -> None:
        """Give a file its name. Unlike a rename, a link fails with FileExistsError when the name is taken. Raises
        BadInput where the file system has no links."""
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise BadInput(
                f"registry: {self.root} is on a file system without hard links (found {error.strerror}, expected a "
                f"file that is written once). Fix: choose a directory on a local disk or on NFS, or an object store by "
                f"its URL"
            ) from None

    @override
    def read(self, name: str) -> bytes | None:
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in NO_FILE:
                raise BadInput(
                    f"{self.url}/{printable(name)} cannot be read ({error.strerror}); what switchback wrote is a plain "
                    "file, and no link"
                ) from None
            raise Unreadable(
                f"{self.url}/{printable(name)} cannot be read ({error.strerror}). Fix: make it readable and try again."
            ) from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise BadInput(f"{self.url}/{printable(name)} is a directory or a device, where a file was expected")
        with os.fdopen(descriptor, "rb") as file:
            # a buffer as large as the limit would cost as much time as the reading
            content = file.read(min(status.st_size, JSON_LIMIT) + 1)
        if len(content) > JSON_LIMIT:
            raise BadInput(f"{self.url}/{name} has more than {JSON_LIMIT} bytes; it was not written by switchback")
        return content

    @override
    def names(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self.path(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.name[0] != ".")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _not_listed(error) from None

    @override
    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    @override
    def take_in(self, directory: Path, name: str, manifest: str) -> None:
        path = self._free_path(name)
        share_tree(directory, self.root)
        sync_tree(directory)
        try:
            directory.rename(path)
            sync(path.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self.copy_in(directory, name, manifest, never)
            shutil.rmtree(directory)

    @override
    def copy_in(self, directory: Path, name: str, manifest: str, stopped: Stopped) -> None:
        path = self._free_path(name)
        with held(path.with_name(f".{path.name}")) as partial:
            try:
                copy_tree(directory, partial, stopped)
                share_tree(partial, self.root)
                sync_tree(partial)
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        sync(path.parent)

    @override
    def copy_out(self, name: str, files: Sequence[HashedFile], manifest: str, into: Path) -> None:
        for file in files:
            copy = into / file.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(self.path(f"{name}/{file.path}"), copy)
            if not copy.is_file() or (copy.stat().st_size, digest_file(copy)) != (file.size, file.sha256):
                raise Damaged(f"{self.url}/{name}/{file.path} is gone or damaged: it is not what was put there")
        shutil.copyfile(self.path(f"{name}/{manifest}"), into / manifest)

    @override
    def fetch(self, name: str, files: Sequence[HashedFile], manifest: str) -> Path:
        return self.path(name)

    @override
    def files(self, name: str) -> dict[str, int]:
        root = self.path(name)
        return {path.relative_to(root).as_posix(): size for path, size in sorted(walk(root))}

    @override
    def digest(self, name: str) -> str:
        try:
            return digest_file(self.path(name))
        except (FileNotFoundError, IsADirectoryError):
            raise Damaged(f"{self.url}/{name} is gone") from None

    @override
    def start(self, name: str, length: int) -> bytes:
        with self.path(name).open("rb") as file:
            return file.read(length)

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
        if not directory.is_dir():
            return []
        incomplete = [
            path
            for path in sorted(directory.iterdir())
            if path.is_dir() and (path.name[0] == "." or not (path / manifest).exists())
        ]
        return [f"{prefix}/{path.name}" for path in incomplete if _free(path)]

    @override
    def leftovers(self, before: datetime) -> list[str]:
        inner = [path for top in PUT_BELOW for path in self.path(top).rglob(".*")]
        at_root = [path for path in self.root.glob(".*") if PARTIAL.fullmatch(path.name)]  # a user may have others
        partials = [path for path in (*at_root, *inner) if path.is_file()]
        return sorted(str(path.relative_to(self.root)) for path in partials if _changed(path) < before.timestamp())

    @override
    def weight(self, name: str) -> int | None:
        path = self.path(name)
        files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
        return sum(file.lstat().st_size for file in files)

    def _free_path(self, name: str) -> Path:
        """The path for a new directory. Raises FileExistsError when it is taken."""
        path = self.path(name)
        make_directory(path.parent, self.root)
        if path.exists():
            raise FileExistsError(path)
        return path


def copy_tree(directory: Path, into: Path, stopped: Stopped) -> None:
    """Copy all files below a directory. Raises InterruptedError soon after it is stopped."""
    for path in sorted(directory.rglob("*")):
        copy = into / path.relative_to(directory)
        if path.is_dir():
            copy.mkdir(exist_ok=True)  # it may be there from a killed copy
        else:
            with copy.open("wb") as out:
                out.writelines(parts(path, stopped))


def parts(path: Path, stopped: Stopped) -> Iterator[bytes]:
    """A file's bytes, PART at a time. Raises InterruptedError soon after it is stopped."""
    with path.open("rb") as file:
        for part in iter(lambda: file.read(PART), b""):
            if stopped():
                raise InterruptedError(path)
            yield part


def _unlisted(error: OSError) -> None:
    """Raise Unreadable for a directory that cannot be listed, since it may hold any files; a missing one holds none."""
    if not isinstance(error, FileNotFoundError):
        raise _not_listed(error)


def _not_listed(error: OSError) -> Unreadable:
    return Unreadable(f"{error.filename} cannot be listed ({error.strerror}). Fix: make it readable and try again.")


def walk(root: Path) -> Iterator[tuple[Path, int]]:
    """(path, bytes) of every file below a directory; -1 for a link, a pipe or a device. A link counts even where it is
    the root, or points at a directory. Opens no file."""
    if root.is_symlink():
        yield root, -1
        return
    for directory, inner, names in os.walk(root, onerror=_unlisted):
        for name in (*inner, *names):
            path = Path(directory, name)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                yield path, status.st_size if stat.S_ISREG(status.st_mode) else -1


@contextmanager
def held(directory: Path) -> Iterator[Path]:
    """A new directory that is locked while this block lasts; the kernel frees the lock however its holder ends."""
    while True:
        directory.mkdir(exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            locks.lock(descriptor)
            if directory.exists() and directory.stat().st_ino == os.fstat(descriptor).st_ino:
                yield directory
                return
        finally:
            os.close(descriptor)


@contextmanager
def _seized(directory: Path) -> Iterator[bool]:
    """Whether this block holds a directory's lock; False when another process does, or when the directory is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield locks.try_lock(descriptor)
    finally:
        os.close(descriptor)


def _free(directory: Path) -> bool:
    """Whether a directory is there and its lock is free."""
    with _seized(directory) as held:
        return held


def _changed(path: Path) -> float:
    """When a file was last written, in seconds since 1970; for one that is gone, now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
