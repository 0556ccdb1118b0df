"""What files an artifact may hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.identity import digest_file
from pipeline.registry.artifact import File
from stages.job import MANIFEST

SAFE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model")
"""Kinds of file an artifact may hold. No pickle, ever."""

AT_ONCE = 8
"""Files that are hashed at once, where there are as many cores."""


class UnsafeFile(ValueError):
    """A file that must not be published."""


def list_files(directory: Path) -> tuple[File, ...]:
    """Every file below a directory with size and digest. Raises UnsafeFile on a link, or on a kind of file that is not allowed."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}
    for relative, path in found.items():
        if path.is_symlink() or (path.is_file() and path.suffix not in SAFE_SUFFIXES):
            raise UnsafeFile(
                f"{relative} must not be published; artifacts hold {', '.join(SAFE_SUFFIXES)} and no links"
            )
    files = {relative: path for relative, path in found.items() if path.is_file() and relative != MANIFEST}
    for path in files.values():
        path.chmod(0o644)
    digests = digest_files(list(files.values()))
    return tuple(
        File(path=relative, size=path.stat().st_size, sha256=digest)
        for (relative, path), digest in zip(files.items(), digests, strict=True)
    )


def digest_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of the bytes of each, several at once: hashing waits for a core, not for a disk."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest_file, paths))
