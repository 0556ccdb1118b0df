"""A place by what a user calls it: a path, or a URL of an object store."""

from __future__ import annotations

from pathlib import Path

from pipeline.registry.store import LocalStore, Store
from stages.job import BadInput


def open_store(place: str) -> Store:
    """Relative paths count from the working directory. Raises BadInput for what is no place."""
    if "://" in place:
        raise BadInput(
            f"registry: {place} is a URL; object stores come in a later version of switchback, so give a directory"
        )
    return LocalStore(Path(place))
