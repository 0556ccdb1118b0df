"""A store on S3, GCS or Azure, through obstore.

A put of an object is atomic, and `put` is a conditional put, so this store keeps the promises of a local directory.
A directory is uploaded file by file, its manifest last. It is downloaded into a local cache and verified meanwhile
(`download_cache`). A request is repeated when its answer is lost, so every conditional put writes a mark of its own: a
put that finds the name taken can tell whether its own first try took it.

obstore does not survive a fork: only the launching process may use this module, never a worker.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, S3Store
from typing_extensions import override

from pipeline.errors import Damaged, Unreadable
from pipeline.registry.stores.download_cache import adopt, cache_of, copying, discard, is_whole
from pipeline.registry.stores.local import parts
from pipeline.registry.stores.store import JSON_LIMIT, PART, Stopped, Store, inside, never
from pipeline.registry.stores.url import Bucket
from stages.errors import BadInput
from stages.runtime.disk import HashedFile

MOST_PARTS = 9000
"""S3 takes 10,000."""
AT_ONCE, SMALL_AT_ONCE = 4, 16
"""Big files in transfer at a time, and parts of each; small files in transfer at a time."""
FIRST_ANSWER, LATER_ANSWERS = timedelta(seconds=8), timedelta(minutes=3)
"""How long a request is repeated: shorter before the first answer, so that a wrong address fails soon."""
FIRST_PATIENCE, LATER_PATIENCE = "8 seconds", "1 day"
"""How long one request may take: a part of a big file takes what it takes."""
GRACE = timedelta(hours=24)
"""A directory without a manifest whose newest file is younger may still be on its way."""
MARK = "writer"
"""Metadata of an object: which put wrote it."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
OPENS: dict[str, tuple[Callable[..., S3Store | GCSStore | AzureStore], str]] = {
    "s3": (S3Store, "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"),
    "gs": (GCSStore, "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": (AzureStore, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
}
"""Scheme -> (what opens it, the environment variables that it is usually opened with)."""

T = TypeVar("T")
R = TypeVar("R")


class ObjectStore(Store):
    """A prefix in a bucket."""

    verifies = True

    def __init__(self, place: Bucket) -> None:
        """Raises BadInput when it does not answer, does not exist, or does not let us in; within about 20 s."""
        self.url, self.work = place.url, Path("work")
        self._place = place
        self._verified: set[str] = set()  # copies that this process has seen to be what was published
        self._cache = cache_of(f"{endpoint()} {self.url}" if place.scheme == "s3" else self.url)
        self._store = self._open(FIRST_ANSWER, FIRST_PATIENCE)
        with self._answers():
            obstore.list_with_delimiter(self._store, "probe")
        self._store = self._open(LATER_ANSWERS, LATER_PATIENCE)

    @override
    def probe(self) -> None:
        name = f"probe/{uuid.uuid4().hex}"
        try:
            first, second = self.put(name, b"first"), self.put(name, b"second")
        finally:
            self.remove(name)
        if second or not first:
            raise BadInput(
                f"registry: {self.url} ignores conditional puts (If-None-Match), so two writers could overwrite each "
                "other; use a store that keeps them"
            )

    @override
    def put(self, name: str, content: bytes) -> bool:
        mark = uuid.uuid4().hex
        with self._answers():
            while True:
                try:
                    obstore.put(self._store, inside(name), content, mode="create", attributes={MARK: mark})
                except AlreadyExistsError:
                    writer = self._writer(name)
                    if writer is not None:
                        return writer == mark  # our own put may have been repeated, because its answer was lost
                else:
                    return True

    @override
    def read(self, name: str) -> bytes | None:
        with self._answers():
            try:
                answer = obstore.get(self._store, inside(name))
            except FileNotFoundError:
                return None
            if answer.meta["size"] > JSON_LIMIT:
                raise BadInput(f"{self.url}/{name} has more than {JSON_LIMIT} bytes; it was not written by switchback")
            return bytes(answer.bytes())

    @override
    def read_each(self, names: Sequence[str]) -> list[bytes | None]:
        return several(lambda name, ended: self.read(name), names, at_once=SMALL_AT_ONCE)

    @override
    def names(self, prefix: str) -> list[str]:
        with self._answers():
            listing = obstore.list_with_delimiter(self._store, inside(prefix))
        paths = [*listing["common_prefixes"], *(entry["path"] for entry in listing["objects"])]
        return sorted(path.rpartition("/")[2] for path in paths)

    @override
    def remove(self, name: str) -> None:
        self._delete(inside(name))

    @override
    def take_in(self, directory: Path, name: str, manifest: str) -> None:
        self.copy_in(directory, name, manifest, never)
        adopt(self._cache, directory, name, manifest)

    @override
    def copy_in(self, directory: Path, name: str, manifest: str, stopped: Stopped) -> None:
        if self.read(f"{name}/{manifest}") is not None:
            raise FileExistsError(f"{self.url}/{name}")
        local = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        content = local.pop(manifest).read_bytes()
        several(lambda path, ended: self._send(local[path], f"{name}/{path}", ended), sorted(local), stopped)
        sent = {path: file.stat().st_size for path, file in local.items()}
        arrived = self.files(name)
        if arrived != sent:
            wrong = sorted(path for path in arrived.keys() | sent.keys() if arrived.get(path) != sent.get(path))
            raise BadInput(f"{self.url}/{name}/{wrong[0]} did not arrive whole; run the same command again")
        if not self.put(f"{name}/{manifest}", content):
            raise FileExistsError(f"{self.url}/{name}")

    @override
    def fetch(self, name: str, files: Sequence[HashedFile], manifest: str) -> Path:
        copy = self._cache.path(name)
        if not is_whole(copy, files, manifest, with_bytes=name not in self._verified):
            discard(self._cache, name)
            with copying(self._cache, name, manifest) as partial:
                self.copy_out(name, files, manifest, partial)
        self._verified.add(name)
        return copy

    @override
    def copy_out(self, name: str, files: Sequence[HashedFile], manifest: str, into: Path) -> None:
        several(lambda file, ended: self._bring(f"{name}/{file.path}", file, into, ended), files)
        content = self.read(f"{name}/{manifest}")
        if content is None:
            raise Damaged(f"{self.url}/{name}/{manifest} is gone")
        (into / manifest).write_bytes(content)

    @override
    def files(self, name: str) -> dict[str, int]:
        start = f"{inside(name)}/"
        return {entry["path"].removeprefix(start): entry["size"] for entry in self._below(name)}

    @override
    def digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for part in self._stream(name):
            digest.update(part)
        return digest.hexdigest()

    @override
    def start(self, name: str, length: int) -> bytes:
        with self._answers():
            try:
                return bytes(obstore.get_range(self._store, inside(name), start=0, length=length))
            except FileNotFoundError:
                raise Damaged(f"{self.url}/{name} is gone; switchback verify names all that is wrong") from None

    @override
    def remove_tree(self, name: str, manifest: str) -> None:
        self.remove(f"{name}/{manifest}")
        self._delete([entry["path"] for entry in self._below(name)])
        self._cache.remove_tree(name, manifest)

    @override
    def abandoned(self, prefix: str, manifest: str) -> list[str]:
        newest: dict[str, datetime] = {}
        complete: set[str] = set()
        start = f"{inside(prefix)}/"
        for entry in self._below(prefix):
            directory, _, path = entry["path"].removeprefix(start).partition("/")
            newest[directory] = max(entry["last_modified"], newest.get(directory, entry["last_modified"]))
            if path in (manifest, ""):  # "": a file directly below the prefix is no directory
                complete.add(directory)
        old = datetime.now(UTC) - GRACE
        return [f"{prefix}/{name}" for name, at in sorted(newest.items()) if name not in complete and at < old]

    def _open(self, repeat: timedelta, patience: str) -> S3Store | GCSStore | AzureStore:
        opens, _ = OPENS[self._place.scheme]
        options: dict[str, Any] = {"connect_timeout": "5 seconds", "read_timeout": "60 seconds", "timeout": patience}
        more: dict[str, Any] = {"retry_config": {"max_retries": 30, "retry_timeout": repeat}}
        if self._place.scheme == "s3":
            more["conditional_put"] = "etag"  # whatever AWS_CONDITIONAL_PUT says
            if plain_http():
                options["allow_http"] = True
        with self._answers():
            return opens(self._place.bucket, prefix=self._place.prefix or None, client_options=options, **more)

    def _writer(self, name: str) -> str | None:
        """The mark of the put that wrote a name, "" for one without a mark; None when the name is gone again."""
        try:
            return obstore.get(self._store, inside(name)).attributes.get(MARK, "")
        except FileNotFoundError:
            return None

    def _below(self, prefix: str) -> Iterator[Any]:
        """All objects below a prefix, at any depth."""
        with self._answers():
            for page in obstore.list(self._store, inside(prefix), chunk_size=1000):
                yield from page

    def _delete(self, names: str | list[str]) -> None:
        with self._answers(), suppress(FileNotFoundError):
            if names:
                obstore.delete(self._store, names)

    def _send(self, path: Path, name: str, stopped: Stopped) -> None:
        if stopped():
            raise InterruptedError(path)
        size = path.stat().st_size
        content = parts(path, stopped) if size > PART else path.read_bytes()
        part = max(PART, size // MOST_PARTS + 1)
        with self._answers():
            obstore.put(self._store, name, content, chunk_size=part, max_concurrency=AT_ONCE)

    def _bring(self, name: str, file: HashedFile, into: Path, stopped: Stopped) -> None:
        """Download a file and verify it."""
        path, digest, size = into / file.path, hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            for part in self._stream(name):
                if stopped():
                    return
                out.write(part)
                digest.update(part)
                size += len(part)
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise Damaged(
                f"{self.url}/{name} is damaged: its bytes are not those that were published; switchback verify names "
                "all that is wrong"
            )

    def _stream(self, name: str) -> Iterator[Any]:
        """The bytes under a name. Raises Damaged when there are none."""
        with self._answers():
            try:
                answer = obstore.get(self._store, inside(name))
            except FileNotFoundError:
                raise Damaged(f"{self.url}/{name} is gone; switchback verify names all that is wrong") from None
            yield from answer.stream(min_chunk_size=PART)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Raise every error of the store as Unreadable with one line. obstore's own messages are never shown, since
        they quote requests."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise Unreadable(f"registry: {self.url}: {_cause(error, self._place)}") from None


def several(
    work: Callable[[T, Stopped], R], items: Iterable[T], stopped: Stopped = never, at_once: int = AT_ONCE
) -> list[R]:
    """The results of `work` on items, a few at a time, in order. An error or a signal stops the items in progress."""
    failed = Event()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            under_way = [pool.submit(work, item, lambda: failed.is_set() or stopped()) for item in items]
            return [done.result() for done in under_way]
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def endpoint() -> str:
    """The URL of an S3 server other than Amazon's; "" for Amazon's."""
    values = [os.environ.get(name) for name in ENDPOINTS]
    return next((value for value in values if value), "")


def plain_http() -> bool:
    """Whether requests go without TLS. Raises BadInput for plain http to another machine, unless AWS_ALLOW_HTTP permits
    it."""
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"):
        return True
    where = urlsplit(endpoint())
    if where.scheme == "http" and where.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise BadInput(
            f"registry: the endpoint {where.hostname} is plain http; use https, or set AWS_ALLOW_HTTP=true if the "
            "network is yours"
        )
    return where.scheme == "http"


def _cause(error: Exception, place: Bucket) -> str:
    """The cause of an error and its fix, from obstore's message."""
    message, (_, variables) = str(error), OPENS[place.scheme]
    code = re.search(r"<Code>(\w{1,60})</Code>", message) or re.search(r"status code: (\d{3})", message)
    answer = code[1] if code else "no answer"
    for pattern, cause in CAUSES.items():
        if re.search(pattern, message):
            return cause.format(bucket=place.bucket, variables=variables, answer=answer, endpoint=_at(place))
    return f"the store failed ({type(error).__name__}); check the URL, and {variables}"


CAUSES = {
    r"NoSuchBucket|ContainerNotFound|bucket does not exist": (
        "there is no bucket {bucket}; make it, or give another URL"
    ),
    r"169\.254\.169\.254|token request|Missing(AccessKeyId|SecretAccessKey|Account)": (
        "no credentials were found; set {variables}"
    ),
    r"service account|credentials file": "the credentials cannot be read; check {variables}",
    r"PermanentRedirect|AuthorizationHeaderMalformed|incorrectly configured region": (
        "the bucket is in another region; set AWS_REGION"
    ),
    r"status code: 40[13]|PermissionDenied|Unauthenticated": "access was refused ({answer}); check {variables}",
    r"status code: \d{3}": ("the store answered {answer} where something else was expected; check the URL{endpoint}"),
    r"error sending request|HTTP error|[Tt]imed? ?out|Connect": (
        "the store cannot be reached; check the network and the URL{endpoint}"
    ),
}
"""Pattern in obstore's message -> the cause and its fix; the first match counts."""


def _at(place: Bucket) -> str:
    """The endpoint's host and port, where one is set: never its user or password."""
    if place.scheme != "s3" or not endpoint():
        return ""
    url = urlsplit(endpoint())
    return f", and the endpoint at {url.hostname}:{url.port or url.scheme}"
