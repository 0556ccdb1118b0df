"""Copies of what lies in an object store: SWITCHBACK_CACHE, else ~/.cache/switchback, with a directory for each store.

A copy is made under a name of its own that is locked while it is made, and renamed when it is whole; so any number of
processes may fetch the same thing at once, and what a killed one leaves is cleaned by the next. Nothing there is ever
the only copy: the cache may be removed at any time when nothing runs.
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
    """Where the copies of a store lie; `place` tells it from all others."""
    return LocalStore(cache_directory() / hashlib.sha256(place.encode()).hexdigest()[:16])


def is_whole(copy: Path, files: Sequence[HashedFile], manifest: str, with_bytes: bool) -> bool:
    """Whether everything is there, of its size, and `with_bytes` of its digest too."""
    if not (copy / manifest).is_file() or any(_size(copy / file.path) != file.size for file in files):
        return False
    return not with_bytes or all(digest_file(copy / file.path) == file.sha256 for file in files)


@contextmanager
def copying(cache: LocalStore, name: str, manifest: str) -> Iterator[Path]:
    """A new directory that becomes the copy of a name when the block ends well, unless another process was faster; else
    it is removed.

    Raises BadInput when the disk does not take it.
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
    """Make a directory that has been published the copy of its name; it is gone afterwards. Raises BadInput when the
    disk does not take it."""
    path = cache.path(name)
    with _writable(path):
        try:
            cache.take_in(directory, name, manifest)
        except FileExistsError:  # another process has fetched it since
            shutil.rmtree(directory)


def discard(cache: LocalStore, name: str) -> None:
    """Take a copy away that is not whole."""
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
    """Remove what killed processes left."""
    for left in cache.abandoned(str(parent), manifest):
        cache.remove_tree(left, manifest)


def _unnamed(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None


CACHE = "SWITCHBACK_CACHE"
"""Environment variable that names another directory for what can be made again."""


def cache_directory() -> Path:
    """SWITCHBACK_CACHE, else `switchback` in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get(CACHE):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "switchback").absolute()
