"""How files are written: all or nothing, so that the disk has them, and for the group of the directory they are in.

Files of a registry take the group of its root and the root's permissions for that group, as in git's
core.sharedRepository. So the members of a team can read, move and resume what one of them made.

root 2775, umask 022 or 077 -> directories 2775, files 664. A root that gives its group nothing changes nothing. The
permissions of the owner and of all others stay those of the umask."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.config import Frozen

AT_ONCE = 8
"""Files that are hashed at once, where there are as many cores."""
FOR_FILES = stat.S_IRGRP | stat.S_IWGRP
"""Permissions that a file may take; a directory takes all of the group's, and the bit that hands the group on."""


class HashedFile(Frozen):
    """A file as a record remembers it."""

    path: str
    """Relative to what the record is of."""
    size: int
    """Bytes."""
    sha256: str


def digest_file(path: Path) -> str:
    """SHA-256 of the bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of the bytes of each, several at once: hashing waits for a core, not for a disk."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest_file, paths))


def write_through(path: Path, content: bytes) -> None:
    """Write and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write all or nothing, in the place of what was there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_through(partial, content)
    partial.replace(path)
    sync(path.parent)


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


def make_directory(directory: Path, root: Path) -> None:
    """Make a directory at or below `root`, with those above it."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        if path != root and path.is_relative_to(root):
            share(path, root)


def share_from_now_on(directory: Path) -> int:
    """Let all that this process makes give its group what `directory` gives it; returns the umask of before. A killed
    process leaves nothing then that another user could not remove."""
    given = directory.stat().st_mode & stat.S_IRWXG
    before = os.umask(0)
    os.umask(before & ~given if given & stat.S_IWGRP else before)
    return before


@contextmanager
def shared(directory: Path) -> Iterator[None]:
    """`share_from_now_on`, until the end of the block."""
    before = share_from_now_on(directory)
    try:
        yield
    finally:
        os.umask(before)


def share_tree(directory: Path, root: Path) -> None:
    """`share` of a directory and of all below it."""
    for path in (directory, *directory.rglob("*")):
        with suppress(FileNotFoundError):  # a process that ends removes what it no longer needs
            share(path, root)


def share(path: Path, root: Path) -> None:
    """Give a file or a directory of this user the group and the group's permissions of `root`. What another user made
    is left alone, and so is a link."""
    of_root, status = root.stat(), path.lstat()
    is_directory = stat.S_ISDIR(status.st_mode)
    if status.st_uid != os.geteuid() or not (is_directory or stat.S_ISREG(status.st_mode)):
        return
    if of_root.st_mode & stat.S_IWGRP and status.st_gid != of_root.st_gid:
        with suppress(PermissionError):  # this user is not of that group
            os.chown(path, -1, of_root.st_gid)
    shared = of_root.st_mode & (stat.S_IRWXG | stat.S_ISGID if is_directory else FOR_FILES)
    if shared & ~status.st_mode:
        path.chmod(stat.S_IMODE(path.lstat().st_mode) | shared)
