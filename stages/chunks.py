"""Work that is done for good as it is done: a batch of sampled completions a file, in `work/chunks/`, named by what was asked for.

A stage that is killed finds them again; one that asks for something else does not. JSON in, JSON out, all or nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.disk import replace

DIRECTORY = "chunks"


@dataclass(frozen=True)
class Chunks:
    """The answers of one policy, of one job."""

    work: Path
    policy: str
    """Its path, which holds its artifact's id."""

    def place(self, asked: Any) -> Path:
        """Where the answer to `asked`, any JSON, lies or will lie."""
        digest = sha256(json.dumps([self.policy, asked], sort_keys=True).encode()).hexdigest()
        return self.work / DIRECTORY / f"{digest[:32]}.json"


def read(place: Path) -> Any:
    """What was committed; None when nothing was."""
    try:
        return json.loads(place.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def count(work: Path) -> int:
    """How many answers are there."""
    return len(list((work / DIRECTORY).glob("[!.]*.json")))


def commit(place: Path, content: Any) -> None:
    """Keep it, whatever happens next."""
    place.parent.mkdir(parents=True, exist_ok=True)
    replace(place, json.dumps(content).encode())
