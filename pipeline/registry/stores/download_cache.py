"""Local copies of artifacts in an object store: SWITCHBACK_CACHE, else ~/.cache/switchback, a directory per store.

A copy is written under a unique name, locked meanwhile, and renamed when it is complete. So any number of processes may
fetch one artifact at once, and the next one cleans up after a killed one. The cache never holds the only copy: it may
be removed while no run is active.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.registry.stores.local import LocalStore, held
from stages.errors import BadInput
from stages.runtime.disk import HashedFile, digest_file, sync_tree


def cache_of(place: str) -> LocalStore:
    """The cache of one store, which `place` identifies."""
    return LocalStore(cache_directory() / hashlib.sha256(place.encode()).hexdigest()[:16])


def is_whole(copy: Path, files: Sequence[HashedFile], manifest: str, with_bytes: bool) -> bool:
    """Whether all files are there with their sizes and, `with_bytes`, their digests."""
    if not (copy / manifest).is_file() or any(_size(copy / file.path) != file.size for file in files):
        return False
    return not with_bytes or all(digest_file(copy / file.path) == file.sha256 for file in files)


@contextmanager
def copying(cache: LocalStore, name: str, manifest: str) -> Iterator[Path]:
    """A new directory that becomes the copy of a name when the block succeeds, unless another process was faster. It is
    removed otherwise.

    Raises BadInput when the disk cannot be written.
    """
    path = cache.path(name)
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(cache, path.relative_to(cache.root).parent, manifest)
        with held(_unnamed(path)) as partial:
            try:
                yield partial
                sync_tree(partial)
                _settle(partial, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def adopt(cache: LocalStore, directory: Path, name: str, manifest: str) -> None:
    """Move a published directory into the cache. Raises BadInput when the disk cannot be written."""
    path = cache.path(name)
    with _writable(path):
        try:
            cache.take_in(directory, name, manifest)
        except FileExistsError:  # another process has fetched it since
            shutil.rmtree(directory)


def discard(cache: LocalStore, name: str) -> None:
    """Remove an incomplete copy."""
    path = cache.path(name)
    aside = _unnamed(path)
    with _writable(path), suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"cache: {error.filename or path} cannot be written: {error.strerror}; make room there, or set {CACHE} to "
            "another directory"
        ) from None


def _settle(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def _clean(cache: LocalStore, parent: Path, manifest: str) -> None:
    """Remove the directories of killed processes."""
    for name in cache.abandoned(str(parent), manifest):
        cache.remove_tree(name, manifest)


def _unnamed(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _size(path: Path) -> int | None:
    if path.is_symlink() or not path.is_file():
        return None
    return path.stat().st_size


CACHE = "SWITCHBACK_CACHE"
"""Environment variable with another directory for files that can be made again."""


def cache_directory() -> Path:
    """SWITCHBACK_CACHE, else `switchback` in XDG_CACHE_HOME, else in ~/.cache."""
    directory = os.environ.get(CACHE)
    if directory:
        return Path(directory).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "switchback").absolute()
