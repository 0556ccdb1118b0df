"""What files an artifact may hold: plain ones, of safe kinds, under names that mean the same everywhere, with tensors
only where their header says so."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UnsafeFile
from pipeline.registry import safetensors_header
from pipeline.registry.artifact import File, check_path, refuse_clashes
from pipeline.registry.stores.local import walk
from stages.errors import printable
from stages.job import MANIFEST
from stages.runtime.disk import digest_files

TENSORS = ".safetensors"


def list_files(directory: Path) -> tuple[File, ...]:
    """Every file below a directory with size and digest. Raises UnsafeFile on a link, a pipe or a device, which is not
    opened; on a kind of file, a path or two paths that are not allowed; and on tensors whose header does not describe
    them."""
    found = {path.relative_to(directory).as_posix(): size for path, size in sorted(walk(directory))}
    found.pop(MANIFEST, None)
    for path, size in found.items():
        if wrong := "is a link, or no plain file" if size < 0 else check_path(path) or _unsafe(directory / path, size):
            raise UnsafeFile(f"{printable(path)} must not be published: {wrong}")
    try:
        refuse_clashes("\n".join(["", *found, ""]))
    except ValueError as error:
        raise UnsafeFile(str(error)) from None
    digests = digest_files([directory / path for path in found])
    for path in found:
        (directory / path).chmod(0o644)
    return tuple(
        File(path=path, size=size, sha256=digest) for (path, size), digest in zip(found.items(), digests, strict=True)
    )


def _unsafe(path: Path, size: int) -> str | None:
    """What is wrong inside a file."""

    def first(length: int) -> bytes:
        with path.open("rb") as file:
            return file.read(length)

    return safetensors_header.problem(first, size) if path.suffix == TENSORS else None
