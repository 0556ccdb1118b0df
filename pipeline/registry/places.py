"""A place by what a user calls it: a path, or a URL of an object store.

A URL says where and nothing else: who may read there comes from the environment, so a URL can be stored, printed and shared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.registry.local import LocalStore
from pipeline.registry.store import Store
from stages.job import BadInput

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
FOLDER = re.compile(r"[A-Za-z0-9._=+-]+")


class Bucket(NamedTuple):
    """A part of an object store."""

    scheme: str
    bucket: str
    prefix: str
    """Where in the bucket, without slashes at its ends; "" for all of it."""

    @property
    def url(self) -> str:
        """What a user would give to open it again."""
        return f"{self.scheme}://{self.bucket}{f'/{self.prefix}' if self.prefix else ''}"


def open_store(place: str) -> Store:
    """Relative paths count from the working directory. Raises BadInput for what is no place, and for an object store that does not answer."""
    scheme = check(place)
    return PLACES[scheme](place)


def check(place: str) -> str:
    """The scheme of a URL, "" for a path, as far as can be said without opening it. Raises BadInput for what is no place."""
    scheme, separator, _ = place.partition("://")
    if not separator:
        return ""
    if scheme not in PLACES:
        known = ", ".join(f"{name}://" for name in PLACES if name)
        raise BadInput(f"{scheme}:// is no place that is known; give a directory or a URL that starts with {known}")
    bucket_of(place)
    return scheme


def bucket_of(url: str) -> Bucket:
    """A URL in its parts. Raises BadInput for one with more in it than a place; what is refused is not repeated, since it may be a secret."""
    scheme, _, rest = url.partition("://")
    if "@" in rest or "?" in rest or "#" in rest:
        raise BadInput(
            f"a {scheme}:// URL has a user, a password or a query in it; give {scheme}://bucket/prefix alone, and credentials in the environment"
        )
    bucket, *folders = rest.rstrip("/").split("/")
    if not BUCKET.fullmatch(bucket) or not all(FOLDER.fullmatch(part) and part.strip(".") for part in folders):
        raise BadInput(f"{url} is no place in an object store; expected {scheme}://bucket or {scheme}://bucket/prefix")
    return Bucket(scheme, bucket, "/".join(folders))


def _directory(place: str) -> Store:
    return LocalStore(Path(place))


def _objects(place: str) -> Store:
    from pipeline.registry.objects import ObjectStore

    return ObjectStore(bucket_of(place))


PLACES: dict[str, Callable[[str], Store]] = {"": _directory, "s3": _objects, "gs": _objects, "az": _objects}
"""Scheme of a URL -> what opens it; "" is a path."""
