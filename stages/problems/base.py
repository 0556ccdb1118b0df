"""What a checkable problem is: rows to work on, rewards to train by, and a score that says what the task means.

A problem is a value with the methods of `Problem`. It knows nothing of models, tokens, prompts or prefixes: it sees a row and
the text of a completion (response prefix included), and answers with plain numbers. The same row and text always give the same answer.

Rows belong to a split by the digest of their content (`split_of`), so no row can be in two splits, whatever the seeds and ranges.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stages.job import Split


@dataclass(frozen=True)
class Row:
    """One instance of a problem. Subclasses add the fields that rewards and score need."""

    id: str
    """Digest of the content: equal rows have equal ids."""
    prompt: str
    """The instance in words, as the user's turn says it; the Format's user template may put more around it."""


@dataclass(frozen=True)
class Judgement:
    """What a completion is worth to the task, as opposed to what it earned in training."""

    score: float
    """0..1; 0 when any rule is broken."""
    outcome: str
    """The first rule that was broken, or the name of success; one of `Problem.outcomes`."""
    solved: bool
    """The score is the best possible."""
    well_formed: bool
    """The text has the right form, whatever it says."""


class Problem(Protocol):
    """Rows + rewards + score."""

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Every outcome a Judgement can have."""
        ...

    @property
    def reward_weights(self) -> Mapping[str, float]:
        """Reward component -> its weight in the reward that training sees."""
        ...

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """Rows start..stop of the endless stream that (split, seed) names; the same call always gives the same rows."""
        ...

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """A completion to imitate, from its first character on; it need not be a good one."""
        ...

    def rewards(self, row: Row, completion: str) -> dict[str, float]:
        """Each component's value in 0..1."""
        ...

    def judge(self, row: Row, completion: str) -> Judgement:
        """The score and why."""
        ...

    def passed(self, score: float) -> bool:
        """Whether a rollout with this score passes; pass rate, pass@k and pass-rate bands all mean this."""
        ...


def row_id(content: Any) -> str:
    """16 hex digits of the SHA-256 of the content's JSON."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


def split_of(id: str) -> Split:
    """Half of all possible rows are for training, a quarter each for validation and held-out; decided by the id alone."""
    return ("train", "train", "validation", "held_out")[int(id[:8], 16) % 4]
