"""The files an artifact may hold: plain files of safe kinds, with portable names and correct tensor headers."""

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
    sizes = {path.relative_to(directory).as_posix(): size for path, size in sorted(walk(directory))}
    sizes.pop(MANIFEST, None)
    for path, size in sizes.items():
        problem = _problem(directory, path, size)
        if problem is not None:
            raise UnsafeFile(f"{printable(path)} must not be published: {problem}")
    try:
        refuse_clashes(list(sizes))
    except ValueError as error:
        raise UnsafeFile(str(error)) from None
    digests = digest_files([directory / path for path in sizes])
    for path in sizes:
        (directory / path).chmod(0o644)
    return tuple(
        File(path=path, size=size, sha256=digest) for (path, size), digest in zip(sizes.items(), digests, strict=True)
    )


def _problem(directory: Path, path: str, size: int) -> str | None:
    """The reason why a file must not be published; None when it may be."""
    if size < 0:
        return "is a link, or no plain file"
    return check_path(path) or _header_problem(directory / path, size)


def _header_problem(path: Path, size: int) -> str | None:
    """The problem with a tensor file's header; None for a correct one, and for a file of another kind."""
    if path.suffix != TENSORS:
        return None

    def first(length: int) -> bytes:
        with path.open("rb") as file:
            return file.read(length)

    return safetensors_header.problem(first, size)
