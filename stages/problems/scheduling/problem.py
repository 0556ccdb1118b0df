"""Event scheduling: choose events so that none overlap and the weighted time is greatest.

After github.com/anakin87/qwen-scheduler-grpo. The score (evaluation/eval.py) is 0 when an answer breaks any rule, else
weighted time / optimum. The first broken rule is the outcome, in this order: format, less_than_2 (fewer events than the
form requires), non_existing (or listed twice), unsorted, overlap (touching is allowed). A schedule without a broken
rule is `valid`.

The reward (train_grpo.ipynb) is .1 for the form, thinking included, and .2 for two or more events in order of start.
The other .7 is the share of the optimum of the events that overlap no other. It is 0 when an event does not exist or is
listed twice, or when there are too few. So an answer that copies every event earns more than two thirds of the reward,
and one hundredth of the score. `overlap: zero` repairs that. Events that touch overlap in the reference
(`reward_overlap: touching`), but not here, as in the score.

A form (`FORMS`) writes instances and reads answers. Rewards and rules are the same for both forms.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, cast

from pydantic import BaseModel

from stages.config import Config, identity
from stages.errors import BadInput
from stages.job import Split
from stages.problems.base import Answer, Judgement, Row, generated, parsed_line, row_id
from stages.problems.scheduling import compact, text
from stages.problems.scheduling.forms import Form, Reading
from stages.problems.scheduling.intervals import Event, Instance, clock, conflicting, optimum, overlaps, touches
from stages.problems.scheduling.schedules import BASELINES, DEMONSTRATORS

FORMS: dict[str, Form] = {"compact": cast(Form, compact), "text": cast(Form, text)}

Overlap = Literal["remove", "zero", "reward"]
RewardOverlap = Literal["strict", "touching"]
CONFLICTS: Mapping[RewardOverlap, Callable[[Event, Event], bool]] = {"strict": overlaps, "touching": touches}
REFERENCE = MappingProxyType({"format": 0.1, "sorted": 0.2, "score": 0.7})
WEIGHTS: Mapping[Overlap, Mapping[str, float]] = {
    "remove": REFERENCE,
    "zero": REFERENCE,
    "reward": MappingProxyType({"format": 0.1, "sorted": 0.2, "overlap": 0.2, "score": 0.5}),
}
"""The component `overlap` takes its weight from the score's; the sum stays 1."""


class SchedulingSettings(Config):
    """Event scheduling: choose events that do not overlap, for the greatest weighted time."""

    name: Literal["scheduling"] = identity()
    form: Literal["compact", "text"] = identity("text")
    """How an instance is written: `text` as in the reference, `compact` for tiny models."""
    overlap: Overlap = identity("remove")
    """What events that overlap cost in training. `remove`: they are not counted, and the others are, as in the
    reference. `zero`: the whole score reward. `reward`: they are not counted, and a component of its own is 1 when none
    overlap; weights are then format .1, sorted .2, overlap .2, score .5."""
    reward_overlap: RewardOverlap = identity("strict")
    """Whether events that touch overlap in training: `strict` no, as in the score; `touching` yes, as in the
    reference."""


@dataclass(frozen=True)
class SchedulingRow(Row):
    """A row of this problem."""

    instance: Instance
    optimum: int
    """The best possible weighted minutes."""

    def columns(self) -> Mapping[str, Any]:
        """Those of the reference's data set, and the id."""
        events = [[name, clock(start), clock(end)] for name, start, end in self.instance.events]
        priority = [event.name for event in self.instance.events if event.name in self.instance.priority]
        return {
            "id": self.id,
            "prompt": self.prompt,
            "events": events,
            "priority_events": priority,
            "optimal_score": self.optimum,
        }


@dataclass(frozen=True)
class Scheduling:
    """The problem. `form` is a key of FORMS; what the others mean is said by SchedulingSettings."""

    form: str = "compact"
    overlap: Overlap = "remove"
    reward_overlap: RewardOverlap = "strict"

    outcomes = ("format", "less_than_2", "non_existing", "unsorted", "overlap", "valid")

    @property
    def reward_weights(self) -> Mapping[str, float]:
        """See Problem.reward_weights."""
        return WEIGHTS[self.overlap]

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """See Problem.rows."""
        return generated(self._generate, split, start, stop, seed)

    def row(self, columns: Mapping[str, Any]) -> Row:
        """See Problem.row. The columns are those of the reference's data set: `events` ([name, "09:00", "10:30"] each)
        and `priority_events`; `prompt` is written where it is missing, and `optimal_score` checked where it is
        there."""
        line = parsed_line(_Line, columns)
        form, instance = FORMS[self.form], _instance(line)
        events = list(instance.events)
        if form.read(form.answer(instance, events)).events != events:
            raise BadInput(
                f"events: found some that no answer in the {self.form} form can name; choose another form, or other "
                "names"
            )
        best = optimum(instance)
        if line.optimal_score not in (None, best):
            raise BadInput(
                f"optimal_score: found {line.optimal_score}, but the best schedule has {best} weighted minutes; "
                "correct or remove it"
            )
        return SchedulingRow(row_id(instance.content()), line.prompt or form.prompt(instance), instance, best)

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """See Problem.demonstration."""
        instance = cast(SchedulingRow, row).instance
        shares, demonstrators = zip(*DEMONSTRATORS, strict=True)
        (choose,) = rng.choices(demonstrators, shares)
        return FORMS[self.form].answer(instance, choose(instance, rng))

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """See Problem.baselines. The last five are `gold` with one rule broken; a name is missing where the row has no
        such answer."""
        instance, form = cast(SchedulingRow, row).instance, FORMS[self.form]
        schedules = {name: choose(instance, rng) for name, choose in BASELINES.items()}
        texts = {name: form.answer(instance, events) for name, events in schedules.items() if events}
        return texts | {"format_broken": texts["gold"].replace("</schedule>", "")}

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """See Problem.judge. Rewards: format, sorted, score, and overlap (1 when real events do not) where it is a
        component."""
        return [self._judge(cast(SchedulingRow, answer.row), answer.text) for answer in answers]

    def passed(self, score: float) -> bool:
        """A valid schedule passes, however short of the optimum."""
        return score > 0

    def _judge(self, row: SchedulingRow, completion: str) -> Judgement:
        reading = FORMS[self.form].read(completion)
        outcome = broken_rule(row.instance, reading, FORMS[self.form].MIN_EVENTS) or "valid"
        weight = sum(map(row.instance.weight, reading.events)) if outcome == "valid" else 0
        rewards = self._rewards(row, reading)
        solved = weight == row.optimum
        return Judgement(weight / row.optimum, outcome, solved, well_formed=reading.well_formed, rewards=rewards)

    def _rewards(self, row: SchedulingRow, reading: Reading) -> dict[str, float]:
        events = reading.events
        valid = len(events) >= FORMS[self.form].MIN_EVENTS and _real(row.instance, events)
        clashing: set[Event] = set()
        paid: list[Event] = []
        if valid:
            clashing = set(conflicting(events, CONFLICTS[self.reward_overlap]))
            paid = [event for event in events if event not in clashing]
        if clashing and self.overlap == "zero":
            paid = []
        values = {
            "format": float(reading.rewarded),
            "sorted": float(len(events) > 1 and _sorted(events)),
            "overlap": float(valid and not clashing),
            "score": sum(map(row.instance.weight, paid)) / row.optimum,
        }
        return {name: values[name] for name in self.reward_weights}

    def _generate(self, rng: random.Random) -> Iterator[SchedulingRow]:
        form = FORMS[self.form]
        while True:
            instance = form.generate(rng)
            yield SchedulingRow(row_id(instance.content()), form.prompt(instance), instance, optimum(instance))


def broken_rule(instance: Instance, reading: Reading, min_events: int) -> str | None:
    """The first rule that an answer breaks, in the order of the module's docstring; None for a valid one."""
    events = reading.events
    if not reading.well_formed:
        return "format"
    if len(events) < min_events:
        return "less_than_2"
    if not _real(instance, events):
        return "non_existing"
    if not _sorted(events):
        return "unsorted"
    if any(a.end > b.start for a, b in pairwise(events)):
        return "overlap"
    return None


def _real(instance: Instance, events: list[Event]) -> bool:
    """Each is the instance's, and none is listed twice."""
    return len(set(events)) == len(events) and set(events) <= set(instance.events)


def _sorted(events: list[Event]) -> bool:
    return all(a.start < b.start for a, b in pairwise(events))


class _Line(BaseModel):
    """A line of the reference's data; other columns are left alone."""

    events: list[tuple[str, str, str]]
    priority_events: list[str]
    optimal_score: int | None = None
    prompt: str | None = None


CLOCK = re.compile(r"([0-9]{2}):([0-5][0-9])")


def _instance(line: _Line) -> Instance:
    events = tuple(Event(name, _minutes(start), _minutes(end)) for name, start, end in line.events)
    if not events or len(set(events)) < len(events):
        raise BadInput("events: found none, or one that is there twice; expected different events")
    for event in events:
        if event.start >= event.end:
            raise BadInput(f"events: {event.name!r} ends before it has started; times after midnight are written 24:10")
    unknown = sorted(set(line.priority_events) - {event.name for event in events})
    if unknown:
        raise BadInput(f"priority_events: {unknown[0]!r} is none of the events; correct or remove it")
    return Instance(events, frozenset(line.priority_events))


def _minutes(time: str) -> int:
    match = CLOCK.fullmatch(time)
    if match is None:
        raise BadInput(f"events: found the time {time!r}, expected one such as 09:30")
    return 60 * int(match[1]) + int(match[2])
