"""The interface of a store, and the promises that a registry needs from a local directory or an object store.

`put` is atomic and says whether it was first. A name that was put never changes. A directory is moved in with its
manifest last. Keys, aliases and runs are append-only logs: entry n+1 is put only if there is none.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from stages.config import Frozen
from stages.errors import BadInput, printable
from stages.runtime.disk import HashedFile

JSON_LIMIT = 64 * 2**20
"""Bytes that a JSON file may have; a longer one is refused before it is parsed."""

PART = 8 * 2**20
"""Bytes of a big file that are copied at a time."""
Stopped = Callable[[], bool]
"""Whether a long copy is to end early."""


def never() -> bool:
    """A `Stopped` for a copy that does not end early."""
    return False


class Store(ABC):
    """A tree of names, each put once. Names are relative, with `/` as separator in every store."""

    url: str
    """The absolute path or the URL that opens this store again."""
    work: Path
    """Default directory of work in progress, which is always local."""

    verifies: bool
    """Whether `fetch` verifies the files that it returns."""

    @abstractmethod
    def probe(self) -> None:
        """Raise BadInput for a store that cannot be written, or that does not keep these promises."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> bool:
        """Write under a name that must not exist, all or nothing; False when it does."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The bytes under a name; None when there are none. Raises BadInput when they are more than JSON_LIMIT."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """The names directly below a prefix, sorted, without those that are still being written."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove one name, if it is there. Callers never remove entries of logs or files of artifacts with it."""

    @abstractmethod
    def take_in(self, directory: Path, name: str, manifest: str) -> None:
        """Move a finished directory in, under a name that must not exist. A reader that sees its `manifest` sees all
        its files."""

    @abstractmethod
    def copy_in(self, directory: Path, name: str, manifest: str, stopped: Stopped) -> None:
        """Copy a finished directory in, as `take_in` does. Raises InterruptedError soon after it is stopped."""

    @abstractmethod
    def copy_out(self, name: str, files: Sequence[HashedFile], manifest: str, into: Path) -> None:
        """Copy files and the manifest of a directory into an empty local one, and verify every file. Raises Damaged for
        a file with other bytes, and for a missing one."""

    @abstractmethod
    def fetch(self, name: str, files: Sequence[HashedFile], manifest: str) -> Path:
        """A local directory with these files and the manifest of a directory of the store. An object store verifies
        them, a local one does not. Raises Damaged as `copy_out` does."""

    @abstractmethod
    def files(self, name: str) -> dict[str, int]:
        """Path -> size of every file below a directory, as the store itself has them; -1 for a link, a pipe or a
        device, which is never followed or opened."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of the bytes under a name, as the store itself has them. Raises Damaged when there are none."""

    @abstractmethod
    def start(self, name: str, length: int) -> bytes:
        """The first `length` bytes under a name, or fewer. Raises FileNotFoundError for a missing name."""

    @abstractmethod
    def remove_tree(self, name: str, manifest: str) -> None:
        """Remove a directory, if it is there: its manifest first, so that the rest never counts as complete."""

    @abstractmethod
    def abandoned(self, prefix: str, manifest: str) -> list[str]:
        """Directories below a prefix that have no manifest and no writer any more."""

    def leftovers(self, before: datetime) -> list[str]:
        """Files that puts left when they were killed before a moment; none where a put leaves nothing behind."""
        return []

    def weight(self, name: str) -> int | None:
        """Bytes below a name; None where the store cannot tell."""
        return None

    def put_new(self, name: str, content: Any) -> bool:
        """`put` of JSON."""
        return self.put(name, json.dumps(content, indent=1).encode())

    def read_each(self, names: Sequence[str]) -> list[bytes | None]:
        """`read` of many names; an object store reads several at a time."""
        return [self.read(name) for name in names]

    def get(self, name: str) -> Any:
        """The JSON under a name; None when there is none. Raises BadInput when it is no JSON."""
        return self._parsed(name, self.read(name))

    def _parsed(self, name: str, content: bytes | None) -> Any:
        if content is None:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise BadInput(f"{self.url}/{name} is no JSON; it was not written by switchback, so remove it") from None

    def append(self, log: str, content: Any) -> int:
        """Put the next entry <n>.json of an append-only log; returns n, from 1. Two writers get two numbers."""
        number = self.last(log) + 1
        while not self.append_at(log, number, content):
            number += 1
        return number

    def append_at(self, log: str, number: int, content: Any) -> bool:
        """Put entry `number` of a log; False when there is one. With `last() + 1` this is a compare-and-swap."""
        return self.put_new(f"{log}/{number:06d}.json", content)

    def entries(self, log: str) -> list[Any]:
        """A log's entries, oldest first. Raises BadInput for an invalid log."""
        names = [f"{log}/{number:06d}.json" for number in self._numbers(log)]
        return [self._parsed(name, content) for name, content in zip(names, self.read_each(names), strict=True)]

    def last(self, log: str) -> int:
        """The number of a log's newest entry; 0 when it has none. Raises BadInput for another file in it, or a missing
        number."""
        return max(self._numbers(log), default=0)

    def newest(self, log: str) -> tuple[int, Any]:
        """(number, content) of a log's newest entry; (0, None) when it has none."""
        number = self.last(log)
        if number == 0:
            return 0, None
        return number, self.get(f"{log}/{number:06d}.json")

    def _numbers(self, log: str) -> list[int]:
        """The numbers of a log's entries, from 1. switchback never leaves one out: a forged entry after a gap would
        otherwise count as the newest."""
        numbers = sorted(self._number(log, name) for name in self.names(log))
        missing = next((n for n, number in enumerate(numbers, 1) if n != number), None)
        if missing and self.read(f"{log}/{missing:06d}.json") is None:  # it may have come while the names were read
            raise self._no_entry(log, f"{numbers[-1]:06d}.json")
        return numbers

    def _number(self, log: str, name: str) -> int:
        if not re.fullmatch(r"(?!000000)[0-9]{6}\.json|[1-9][0-9]{6,17}\.json", name):
            raise self._no_entry(log, name)
        return int(name.removesuffix(".json"))

    def _no_entry(self, log: str, name: str) -> BadInput:
        where = printable(f"{log}/{name}")
        return BadInput(f"{where} is no entry of this log; switchback did not write it, so remove it from {self.url}")


def inside(name: str) -> str:
    """The name itself, if it stays below its root. Raises BadInput for any other."""
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise BadInput(f"{printable(name)} leaves the registry; give the id of a run or an artifact")
    return name


Record = TypeVar("Record", bound=Frozen)


def read_as(store: Store, name: str, record: type[Record]) -> Record | None:
    """The record under a name; None when there is none. Raises BadInput for any other content."""
    content = store.read(name)
    if content is None:
        return None
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise BadInput(
            f"{store.url}/{name}: {where}: {first['msg']}; it was not written by switchback, so remove it"
        ) from None
