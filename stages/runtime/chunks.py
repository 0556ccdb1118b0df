"""Work that is done for good as it is done: batches of sampled completions in `work/chunks/`, a file each, named by
what was asked for.

A shelf holds the answers to one question, such as all completions of a policy at a temperature; an answer is found by
its own name, whatever batch it was made in. A stage that is killed finds them again; one that asks for something else
does not. JSON in, JSON out, all or nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.runtime.disk import replace

DIRECTORY = "chunks"


@dataclass(frozen=True)
class Shelf:
    """The answers to one question."""

    directory: Path
    question: str
    """Digest of it."""

    def read(self) -> dict[str, Any]:
        """Name -> answer, of all that were committed. A file that cannot be read counts as not committed."""
        found: dict[str, Any] = {}
        for path in sorted(self.directory.glob(f"{self.question}-*.json")):
            try:
                found |= json.loads(path.read_bytes())
            except ValueError:
                continue
        return found

    def commit(self, answers: dict[str, Any]) -> None:
        """Keep them, whatever happens next."""
        self.directory.mkdir(parents=True, exist_ok=True)
        replace(self.directory / f"{self.question}-{_digest(sorted(answers))}.json", json.dumps(answers).encode())


@dataclass(frozen=True)
class Chunks:
    """The answers of one policy, of one job."""

    work: Path
    policy: str
    """Its path, which holds its artifact's id."""

    def shelf(self, question: Any) -> Shelf:
        """The shelf for the answers to a question, which is any JSON value."""
        return Shelf(self.work / DIRECTORY, _digest([self.policy, question]))


def count(work: Path) -> int:
    """How many batches are there."""
    return len(list((work / DIRECTORY).glob("[!.]*.json")))


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
