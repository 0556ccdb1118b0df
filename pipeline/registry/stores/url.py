"""A URL of an object store in its parts. It says where and nothing else: who may read there comes from the environment,
so a URL can be stored, printed and shared."""

from __future__ import annotations

import re
from typing import NamedTuple

from stages.errors import BadInput

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


def bucket_of(url: str) -> Bucket:
    """A URL in its parts. Raises BadInput for one with more in it than a place; what is refused is not repeated, since
    it may be a secret."""
    scheme, _, rest = url.partition("://")
    if "@" in rest or "?" in rest or "#" in rest:
        raise BadInput(
            f"a {scheme}:// URL has a user, a password or a query in it; give {scheme}://bucket/prefix alone, and "
            "credentials in the environment"
        )
    bucket, *folders = rest.rstrip("/").split("/")
    if not BUCKET.fullmatch(bucket) or not all(FOLDER.fullmatch(part) and part.strip(".") for part in folders):
        raise BadInput(f"{url} is no place in an object store; expected {scheme}://bucket or {scheme}://bucket/prefix")
    return Bucket(scheme, bucket, "/".join(folders))
