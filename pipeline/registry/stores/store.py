"""Where bytes live. A registry needs few promises of a place, and a local directory and an object store can both keep
them.

`put` is all or nothing and says whether it was first; nothing that was put is ever changed; a directory is taken in
whole, its manifest last. What needs an order of its own (who made a key, where an alias points, what a run did) is an
append-only log: entry n+1 is put where none may be.
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
"""Bytes of a big file that are moved at a time."""
Stopped = Callable[[], bool]
"""Whether somebody wants a long copy to end early."""


def never() -> bool:
    """Nobody ends it early."""
    return False


class Store(ABC):
    """A tree of names, each put once. Names are relative and have `/` in them, whatever the place."""

    url: str
    """What a user would give to open the same place again: an absolute path, or a URL."""
    work: Path
    """Where work in progress lies, unless the user says otherwise: always a local directory."""

    verifies: bool
    """Whether what `fetch` gives has been verified by it."""

    @abstractmethod
    def probe(self) -> None:
        """Raise BadInput for a place that cannot be written, or that does not keep these promises."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> bool:
        """Write under a name that must not exist, all or nothing; False when it does."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The bytes under a name; None when there are none. Raises BadInput when they are more than JSON_LIMIT."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """What lies directly below a prefix, sorted; nothing that is still being written."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take one name away; one that is gone already is fine. Logs and artifacts are never touched by it."""

    @abstractmethod
    def take_in(self, directory: Path, name: str, manifest: str) -> None:
        """Move a finished directory in, under a name that must not exist. Whoever sees its `manifest` sees all of it;
        `directory` is gone afterwards."""

    @abstractmethod
    def copy_in(self, directory: Path, name: str, manifest: str, stopped: Stopped) -> None:
        """The same, but `directory` stays. Raises InterruptedError soon after it is stopped."""

    @abstractmethod
    def copy_out(self, name: str, files: Sequence[HashedFile], manifest: str, into: Path) -> None:
        """Copy these files and the manifest of a directory into an empty local one, every one verified. Raises Damaged
        for a file that is not what it should be, and for one that is gone."""

    @abstractmethod
    def fetch(self, name: str, files: Sequence[HashedFile], manifest: str) -> Path:
        """A local directory with these files and the manifest of a directory of the store. What is fetched from
        elsewhere is verified; what is local already is not. Raises Damaged as `copy_out` does."""

    @abstractmethod
    def files(self, name: str) -> dict[str, int]:
        """Path -> size of every file below a directory, as the place itself has them; -1 for what is no plain file (a
        link, a pipe, a device), which is never followed or opened."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of the bytes under a name, as the place itself has them. Raises Damaged when there are none."""

    @abstractmethod
    def start(self, name: str, length: int) -> bytes:
        """The first bytes under a name, at most so many. Raises FileNotFoundError when there are none."""

    @abstractmethod
    def remove_tree(self, name: str, manifest: str) -> None:
        """Take a directory away, its manifest first, so that what is left of it is never taken for whole. One that is
        gone already is fine."""

    @abstractmethod
    def abandoned(self, prefix: str, manifest: str) -> list[str]:
        """Directories below a prefix that have no manifest and that nobody is still writing."""

    def leftovers(self, before: datetime) -> list[str]:
        """Names that puts which were killed before a moment have left, to be removed; none where a put leaves
        nothing."""
        return []

    def weight(self, name: str) -> int | None:
        """Bytes below a name; None where a place cannot tell."""
        return None

    def put_new(self, name: str, content: Any) -> bool:
        """`put` of JSON."""
        return self.put(name, json.dumps(content, indent=1).encode())

    def read_each(self, names: Sequence[str]) -> list[bytes | None]:
        """`read` of many names; a store that is far away reads several at a time."""
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
        """Put entry `number` of a log; False when somebody else has put it. With `last() + 1` this is a
        compare-and-swap."""
        return self.put_new(f"{log}/{number:06d}.json", content)

    def entries(self, log: str) -> list[Any]:
        """A log's entries, oldest first. Raises BadInput for a log with anything else in it."""
        names = [f"{log}/{number:06d}.json" for number in self._numbers(log)]
        return [self._parsed(name, content) for name, content in zip(names, self.read_each(names), strict=True)]

    def last(self, log: str) -> int:
        """The number of a log's newest entry; 0 when it has none. Raises BadInput for a log with anything else in it,
        or with a number left out."""
        return max(self._numbers(log), default=0)

    def newest(self, log: str) -> tuple[int, Any]:
        """(number, content) of a log's newest entry; (0, None) when it has none."""
        number = self.last(log)
        return number, self.get(f"{log}/{number:06d}.json") if number else None

    def _numbers(self, log: str) -> list[int]:
        """The numbers of a log's entries, from 1. One that was left out was never written by us: it would let the
        entries after it be the last word."""
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
    """A name that stays below its root. Raises BadInput for any other."""
    if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise BadInput(f"{printable(name)} leaves the registry; give the id of a run or an artifact")
    return name


Record = TypeVar("Record", bound=Frozen)


def read_as(store: Store, name: str, record: type[Record]) -> Record | None:
    """What lies under a name; None when nothing does. Raises BadInput when it is something else."""
    if (content := store.read(name)) is None:
        return None
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise BadInput(
            f"{store.url}/{name}: {where}: {first['msg']}; it was not written by switchback, so remove it"
        ) from None
