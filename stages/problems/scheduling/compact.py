"""The compact form of a scheduling instance, for models of a few hundred thousand parameters.

One token-friendly line an event, whole hours, `*` marks a priority:

    A* 12:00-13:00                      <think>
    B 11:00-14:00          is answered  A 2B 3                    (weighted hours of each event)
                                        </think>
                                        <schedule>
                                        B 11:00-14:00
                                        </schedule>

Departs from the reference task (github.com/anakin87/qwen-scheduler-grpo): four events of 1-4 hours, priorities inline,
lines instead of XML, and a schedule of one event is allowed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from stages.problems.scheduling.forms import Reading
from stages.problems.scheduling.intervals import Event, Instance, overlaps

NAMES = "ABCDEF"
FIRST_HOUR, LAST_HOUR, LONGEST = 8, 20, 4
EVENTS = 4
MIN_EVENTS = 1
"""A schedule with fewer events is refused."""

ANSWER = re.compile(r"<think>\n[^<]*+</think>\n<schedule>\n(?P<body>[^<]*+)</schedule>\s*+")
LINE = re.compile(r"([A-F]) (\d\d):00-(\d\d):00\n")


def generate(rng: random.Random) -> Instance:
    """Four random events of which at least two overlap; one or two are priorities."""
    while True:
        names = NAMES[:EVENTS]
        events = tuple(_event(name, rng) for name in names)
        priority = frozenset(rng.sample(names, rng.randint(1, EVENTS // 2)))
        if any(overlaps(a, b) for i, a in enumerate(events) for b in events[i + 1 :]):
            return Instance(events, priority)


def prompt(instance: Instance) -> str:
    """The instance as the user's turn says it."""
    return "".join(_line(event, "*" if event.name in instance.priority else "") for event in instance.events)


def answer(instance: Instance, chosen: Sequence[Event]) -> str:
    """The whole completion that books `chosen`, reasoning included."""
    hours = "".join(f"{event.name} {instance.weight(event) // 60}" for event in instance.events)
    return f"<think>\n{hours}\n</think>\n<schedule>\n{''.join(_line(event) for event in chosen)}</schedule>"


def read(completion: str) -> Reading:
    """The events of an answer in the order they are written; none when the form is wrong."""
    malformed = Reading(False, False, [])
    match = ANSWER.fullmatch(completion)
    if match is None:
        return malformed
    body = match["body"]
    events = [Event(name, 60 * int(start), 60 * int(end)) for name, start, end in LINE.findall(body)]
    if "".join(map(_line, events)) != body:
        return malformed
    return Reading(True, True, events)


def _event(name: str, rng: random.Random) -> Event:
    hours = rng.randint(1, LONGEST)
    start = rng.randint(FIRST_HOUR, LAST_HOUR - hours)
    return Event(name, 60 * start, 60 * (start + hours))


def _line(event: Event, mark: str = "") -> str:
    return f"{event.name}{mark} {event.start // 60:02d}:00-{event.end // 60:02d}:00\n"
