"""Durable writes: complete files, in directories that are synced too."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.config import Frozen

AT_ONCE = 8
"""Files that are hashed at once, where there are as many cores."""


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
