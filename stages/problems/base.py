"""The interface of a checkable problem: rows, rewards for training, and a score for evaluation.

A problem is a value with the methods of `Problem`. It knows nothing of models, prompts or prefixes: it sees rows and
the texts of completions (response prefix included), and answers with plain numbers. The same row and text always give
the same answer.

Rows belong to a split by the digest of their content (`Row.split`), so no row can be in two splits, whatever the seeds
and ranges. Two rows of a user's own problem that ask the same are in one split, whatever their other columns say.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from stages.errors import BadInput, TooFew
from stages.job import Split


@dataclass(frozen=True)
class Row:
    """One instance of a problem. Subclasses add the fields that rewards and score need."""

    id: str
    """Digest of the content: equal rows have equal ids."""
    prompt: str
    """The instance in words, as the user's turn says it; the Format's user template may put more around it."""

    def columns(self) -> Mapping[str, Any]:
        """Values that the user template and a prefix per row can name, `id` and `prompt` among them."""
        return asdict(self)

    def line(self) -> Mapping[str, Any]:
        """The row as a line of a file. `Problem.row` makes an equal row of it."""
        return self.columns()

    @property
    def split(self) -> Split:
        """The split that the row belongs to."""
        return split_of(self.id)


R = TypeVar("R", bound=Row)


class Answer(NamedTuple):
    """A completion of a row, to be judged."""

    row: Row
    text: str
    """Response prefix included."""
    ids: Sequence[int] = ()
    """The sampled ids, without the prefix; empty for a text that was not sampled."""


@dataclass(frozen=True)
class Judgement:
    """The rewards of a completion in training, and its score and outcome in the task."""

    score: float
    """0..1; 0 when any rule is broken."""
    outcome: str
    """The first rule that was broken, or the name of success; one of `Problem.outcomes`."""
    solved: bool
    """The score is the best possible."""
    well_formed: bool
    """The text has the right form, whatever it says."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Component -> its value; None where it does not apply to the row, or could not be had."""
    failure: str | None = None
    """What user code did instead of judging, such as `timeout`; every reward is then None and the score 0. None: it
    judged."""
    scored: bool = True
    """It has a score. False where no component applies to the row, or its score is None; `score` is then 0."""


def total(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the components that apply; None where none does. `stages.rewards.compose.weighted_sum` is
    the same for tensors."""
    values = [(weight, rewards.get(name)) for name, weight in weights.items()]
    applied = [weight * value for weight, value in values if value is not None]
    return sum(applied) if applied else None


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

    def row(self, columns: Mapping[str, Any]) -> Row:
        """The row that a line of a file describes. Raises BadInput for a line that is none."""
        ...

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """A completion to imitate, from its first character on; it need not be a good one."""
        ...

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """Name -> a completion that needs no model, for the audit; `gold` is the best there is. Empty: none are
        known."""
        ...

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Rewards and score of each, in order. An answer's judgement does not depend on the others."""
        ...

    def passed(self, score: float) -> bool:
        """Whether a rollout with this score passes; pass rate, pass@k and pass-rate bands all mean this."""
        ...


def passes(problem: Problem, judgement: Judgement) -> bool:
    """Whether an answer passes; one that could not be judged, or has no score, does not, whatever its score of 0 would
    mean."""
    return judgement.failure is None and judgement.scored and problem.passed(judgement.score)


def row_id(content: Any) -> str:
    """16 hex digits of the SHA-256 of the content's JSON."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


def split_of(digest: str) -> Split:
    """The split of what has this digest: train for half of all possible ones, a quarter each for the other two."""
    return ("train", "train", "validation", "held_out")[int(digest[:8], 16) % 4]


def folded(text: str) -> str:
    """The text with one blank for every run of white space, and none at its ends: two prompts that are equal so are one
    question."""
    return " ".join(text.split())


EXHAUSTED = 20_000
"""Consecutive rows without a new one, after which a stream counts as exhausted."""


def allotted(rows: Iterator[R], split: Split) -> Iterator[R]:
    """The distinct rows of a stream that belong to a split, until the stream is exhausted."""
    seen: set[str] = set()
    stale = 0
    for row in rows:
        stale += 1
        if row.split == split and row.id not in seen:
            seen.add(row.id)
            stale = 0
            yield row
        if stale == EXHAUSTED:
            return


def taken(rows: Iterator[R], start: int, stop: int) -> list[R]:
    """Rows start..stop. Raises TooFew when there are fewer."""
    first = list(islice(rows, stop))
    if len(first) < stop:
        raise TooFew(
            f"the problem has only {len(first)} in this split, but row {stop - 1} was asked for; ask for fewer, or for "
            "harder rows",
            len(first),
        )
    return first[start:]


L = TypeVar("L", bound=BaseModel)


def parsed_line(model: type[L], columns: Mapping[str, Any]) -> L:
    """A line of a file as a model. Raises BadInput with the first invalid field."""
    try:
        return model.model_validate(columns)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field_name, message = ".".join(map(str, first["loc"])), first["msg"]
        raise BadInput(f"{field_name}: {message[0].lower()}{message[1:]}") from None


STREAMS: dict[Split, str] = {"train": "train-{seed}", "validation": "validation", "held_out": "held-out-7c41"}
"""Seed of the generator of a split's stream. Validation and held-out rows are the same for every seed."""


def stream(generate: Callable[[random.Random], Iterator[R]], split: Split, seed: int) -> Iterator[R]:
    """The rows of (split, seed) of a problem that generates them."""
    return allotted(generate(random.Random(STREAMS[split].format(seed=seed))), split)


def generated(
    generate: Callable[[random.Random], Iterator[Row]], split: Split, start: int, stop: int, seed: int
) -> list[Row]:
    """`Problem.rows` of a problem that generates its rows. Raises TooFew when there are fewer."""
    return taken(stream(generate, split, seed), start, stop)


LARGEST_WEIGHT = 1e6
"""Of a component: with the largest reward that user code may return, a sum that float32 still holds."""
