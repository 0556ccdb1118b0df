"""URLs of object stores. A URL holds no credentials, which come from the environment, so it can be stored, printed and
shared."""

from __future__ import annotations

import re
from typing import NamedTuple

from stages.errors import BadInput

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
FOLDER = re.compile(r"[A-Za-z0-9._=+-]+")


class Bucket(NamedTuple):
    """A bucket, or a prefix in it."""

    scheme: str
    bucket: str
    prefix: str
    """Path in the bucket, without slashes at its ends; "" for the complete bucket."""

    @property
    def url(self) -> str:
        """The URL that opens it again."""
        folders = f"/{self.prefix}" if self.prefix else ""
        return f"{self.scheme}://{self.bucket}{folders}"


def bucket_of(url: str) -> Bucket:
    """The parts of a URL. Raises BadInput for a URL with a user, a password or a query, and does not repeat it, since
    it may hold a secret."""
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
