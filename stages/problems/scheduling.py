"""Event scheduling: choose events so that none overlap and the weighted time is greatest.

After github.com/anakin87/qwen-scheduler-grpo: the rewards are 10 for the form, 20 for real events in order, 70 x score; the score is
0 when any rule is broken, else weighted time / optimum. The rules are judged in this order, and the first broken one is the outcome: format,
less_than_2 (fewer events than the form asks for), non_existing (or listed twice), unsorted, overlap. A schedule that breaks none is `valid`.

How an instance is written and an answer is read is the form's business (`FORMS`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from types import MappingProxyType
from typing import Any, Protocol, cast

from stages.job import Split
from stages.problems import compact
from stages.problems.base import Answer, Judgement, Row, row_id, stream
from stages.problems.intervals import Event, Instance, greedy, optimum


class Form(Protocol):
    """A module that writes instances and reads answers."""

    MIN_EVENTS: int

    def generate(self, rng: random.Random) -> Instance:
        """A random instance."""
        ...

    def prompt(self, instance: Instance) -> str:
        """The instance as the user's turn says it."""
        ...

    def answer(self, instance: Instance, chosen: Sequence[Event]) -> str:
        """The completion that books `chosen`."""
        ...

    def parse(self, completion: str) -> list[Event] | None:
        """What a completion books; None when its form is wrong."""
        ...


FORMS: dict[str, Form] = {"compact": cast(Form, compact)}


@dataclass(frozen=True)
class SchedulingRow(Row):
    """A row of this problem."""

    instance: Instance
    optimum: int
    """The best possible weighted minutes."""


Choose = Callable[[Instance, random.Random], list[Event]]
DEMONSTRATORS: tuple[tuple[float, Choose], ...] = (
    (0.5, lambda instance, rng: sorted(instance.events, key=lambda e: e.start)),
    (0.2, lambda instance, rng: greedy(instance, key=lambda e: e.start)),
    (0.2, lambda instance, rng: greedy(instance, key=lambda e: e.end - e.start)),
    (0.1, lambda instance, rng: greedy(instance, key=lambda e: rng.random())),
)
"""Share of the demonstrations, and who makes them: everything at once (double-booked, worth 0), first come first served, shortest
first, random order. They show the form and leave the task to be learned: their mean score is about 0.41."""


@dataclass(frozen=True)
class Scheduling:
    """The problem. `form` is a key of FORMS."""

    form: str = "compact"

    outcomes = ("format", "less_than_2", "non_existing", "unsorted", "overlap", "valid")
    reward_weights = MappingProxyType({"format": 0.1, "sorted": 0.2, "score": 0.7})

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """See Problem.rows."""
        return list(islice(stream(self._generate, split, seed), start, stop))

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """See Problem.demonstration."""
        instance = cast(SchedulingRow, row).instance
        shares, demonstrators = zip(*DEMONSTRATORS, strict=True)
        (choose,) = rng.choices(demonstrators, shares)
        return FORMS[self.form].answer(instance, choose(instance, rng))

    def row(self, columns: Mapping[str, Any]) -> Row:
        """See Problem.row."""
        raise NotImplementedError

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """See Problem.baselines."""
        return {}

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """See Problem.judge. Rewards: format: the form is right. sorted: two or more real events, in strict order of start. score: the score."""
        return [self._judge(cast(SchedulingRow, answer.row), answer.text) for answer in answers]

    def _judge(self, row: SchedulingRow, completion: str) -> Judgement:
        events = FORMS[self.form].parse(completion)
        real = events is not None and set(events) <= set(row.instance.events)
        in_order = events is not None and len(events) > 1 and real and _sorted(events)
        outcome = broken_rule(row.instance, events, FORMS[self.form].MIN_EVENTS) or "valid"
        weight = sum(map(row.instance.weight, events or ())) if outcome == "valid" else 0
        score = weight / row.optimum
        rewards = {"format": float(events is not None), "sorted": float(in_order), "score": score}
        return Judgement(score, outcome, solved=weight == row.optimum, well_formed=events is not None, rewards=rewards)

    def passed(self, score: float) -> bool:
        """A valid schedule passes, however short of the optimum."""
        return score > 0

    def _generate(self, rng: random.Random) -> Iterator[SchedulingRow]:
        form = FORMS[self.form]
        while True:
            instance = form.generate(rng)
            yield SchedulingRow(row_id(instance.content()), form.prompt(instance), instance, optimum(instance))


def broken_rule(instance: Instance, events: list[Event] | None, min_events: int) -> str | None:
    """The first rule that a schedule breaks, in the order of the module's docstring; None for a valid one."""
    if events is None:
        return "format"
    if len(events) < min_events:
        return "less_than_2"
    if len(set(events)) < len(events) or not set(events) <= set(instance.events):
        return "non_existing"
    if not _sorted(events):
        return "unsorted"
    if any(a.end > b.start for a, b in pairwise(events)):
        return "overlap"
    return None


def _sorted(events: list[Event]) -> bool:
    return all(a.start < b.start for a, b in pairwise(events))
