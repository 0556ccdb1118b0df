"""What files an artifact may hold."""

from __future__ import annotations

from pathlib import Path

from pipeline.identity import digest_file
from pipeline.registry.artifact import File
from stages.job import MANIFEST

SAFE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model")
"""Kinds of file an artifact may hold. No pickle, ever."""


class UnsafeFile(ValueError):
    """A file that must not be published."""


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
