"""Opens the store at a path or a URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.registry.stores.local import LocalStore
from pipeline.registry.stores.store import Store
from pipeline.registry.stores.url import bucket_of
from stages.errors import BadInput


def open_store(place: str) -> Store:
    """The store at a path, relative to the working directory, or at a URL. Raises BadInput for an invalid place, and
    for an object store that does not answer."""
    scheme = check(place)
    return PLACES[scheme](place)


def check(place: str) -> str:
    """The scheme of a URL, "" for a path; opens nothing. Raises BadInput for an invalid place."""
    scheme, separator, _ = place.partition("://")
    if not separator:
        return ""
    if scheme not in PLACES:
        known = ", ".join(f"{name}://" for name in PLACES if name)
        raise BadInput(f"{scheme}:// is no place that is known; give a directory or a URL that starts with {known}")
    bucket_of(place)
    return scheme


def _directory(place: str) -> Store:
    return LocalStore(Path(place))


def _objects(place: str) -> Store:
    from pipeline.registry.stores.objects import ObjectStore

    return ObjectStore(bucket_of(place))


PLACES: dict[str, Callable[[str], Store]] = {"": _directory, "s3": _objects, "gs": _objects, "az": _objects}
"""Scheme of a URL -> function that opens it; "" is a path."""
