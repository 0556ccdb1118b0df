"""The text form of a scheduling instance, as the reference task has it (github.com/anakin87/qwen-scheduler-grpo).

    Events:                              <think>
    - Jury discussion (09:07 - 10:07)    Weighted minutes: Jury discussion 60, Red carpet photos 2 x 30 = 60
    - Red carpet photos (10:00 - 10:30)  </think>
                            is answered  <schedule>
    Priorities:                          <event>
    - Red carpet photos                  <name>Red carpet photos</name>
                                         <start>10:00</start>
                                         <end>10:30</end>
                                         </event>
                                         </schedule>

Instances are made as by its dataset_generation/generate.py, with event names of our own, and priorities in the order of
the events. Answers are read as by its regular expressions, of which there are two for the whole: evaluation/eval.py's
wants a schedule with an event in it somewhere, train_grpo.ipynb's wants a <think> at the very start, too. Both only ask
for tags in an order, so looking for one after the other finds what they find, in time linear in the text; theirs
backtrack. Times are compared as they are written: 09:75 is no way to write 10:15.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import combinations

from stages.problems.scheduling.event_names import NAMES
from stages.problems.scheduling.forms import Reading
from stages.problems.scheduling.intervals import Event, Instance, clock, in_order, touches

EVENTS = (4, 8)
DURATIONS = range(15, 121, 15)
"""Minutes."""
LAST_START = 21 * 60 + 59
"""Of an event that is not made to overlap; those that are may end after midnight, and are written 24:10."""
OVERLAP_PROBABILITY = 0.2
MAX_OVERLAPS = 0.4
"""Pairs that overlap or touch, per event; there is one at least."""
PRIORITIES = (0.2, 0.4)
"""Share of the events, rounded down; one at least."""
MIN_EVENTS = 2

TIME = r"\d{2}:\d{2}"
START, END = re.compile(f"<start>{TIME}</start>"), re.compile(f"<end>{TIME}</end>")
SCHEDULE: tuple[str | re.Pattern[str], ...] = ("<event>", "<name>", "</name>", START, END, "</event>", "</schedule>")
"""Tags after <schedule>, in this order, with any text between them."""
EVENT = re.compile(rf"<event>\s*+<name>([^<]++)</name>\s*+<start>({TIME})</start>\s*+<end>({TIME})</end>\s*+</event>")


def generate(rng: random.Random) -> Instance:
    """4 to 8 events of one kind of day, by start time. Drawn again until the overlaps are as they should be."""
    names = NAMES[rng.choice(list(NAMES))]
    while True:
        events = _events(rng.sample(names, rng.randint(*EVENTS)), rng)
        overlapping = sum(touches(a, b) for a, b in combinations(events, 2))
        if 1 <= overlapping <= MAX_OVERLAPS * len(events):
            least, most = (max(1, int(share * len(events))) for share in PRIORITIES)
            priority = rng.sample(events, rng.randint(least, most))
            return Instance(tuple(events), frozenset(event.name for event in priority))


def prompt(instance: Instance) -> str:
    """The instance as the user's turn says it."""
    events = [f"- {name} ({clock(start)} - {clock(end)})" for name, start, end in instance.events]
    priorities = [f"- {event.name}" for event in instance.events if event.name in instance.priority]
    return "\n".join(["Events:", *events, "", "Priorities:", *priorities])


def answer(instance: Instance, chosen: Sequence[Event]) -> str:
    """The whole completion that books `chosen`, reasoning included."""
    weights = ", ".join(_weighed(instance, event) for event in instance.events)
    schedule = "".join(
        f"<event>\n<name>{name}</name>\n<start>{clock(start)}</start>\n<end>{clock(end)}</end>\n</event>\n"
        for name, start, end in chosen
    )
    return f"<think>\nWeighted minutes: {weights}\n</think>\n<schedule>\n{schedule}</schedule>"


def read(completion: str) -> Reading:
    """The events that a completion books, wherever they are in it."""
    events = [_event(*found) for found in EVENT.findall(completion)]
    return Reading(_schedule(completion, 0, name=0), _thought_first(completion), events)


def _thought_first(text: str) -> bool:
    """The whole form of train_grpo.ipynb: thinking and names have a character at least."""
    think, close = "<think>", "</think>"
    closed = text.find(close, len(think) + 1)
    return text.startswith(think) and closed >= 0 and _schedule(text, closed + len(close), name=1)


def _schedule(text: str, at: int, name: int) -> bool:
    """Whether an event in a schedule comes after `at`, with at least `name` characters between <name> and </name>. The
    first place of each tag will do: a later one leaves less for the others."""
    at = _after(text, "<schedule>", at)
    for tag in SCHEDULE:
        if at < 0:
            return False
        at = _after(text, tag, at + name if tag == "</name>" else at)
    return at >= 0


def _after(text: str, tag: str | re.Pattern[str], at: int) -> int:
    """The end of the next `tag` from `at` on; -1 when there is none."""
    if isinstance(tag, re.Pattern):
        match = tag.search(text, at)
        return match.end() if match else -1
    start = text.find(tag, at)
    return start + len(tag) if start >= 0 else -1


def _event(name: str, start: str, end: str) -> Event:
    """With other digits, or 75 minutes, it is none of any row's events, however the minutes add up: no row's name has a
    < in it."""
    event = Event(name, _minutes(start), _minutes(end))
    if (clock(event.start), clock(event.end)) == (start, end):
        return event
    return event._replace(name=f"{name}<{start}-{end}")


def _events(names: Sequence[str], rng: random.Random) -> list[Event]:
    """An event for each name, every one but the first perhaps made to overlap one before it; by start time."""
    events: list[Event] = []
    for name in names:
        if events and rng.random() < OVERLAP_PROBABILITY:
            other = rng.choice(events)
            start = rng.randint(other.start, other.end - 1)
        else:
            start = rng.randint(0, LAST_START)
        events.append(Event(name, start, start + rng.choice(DURATIONS)))
    return in_order(events)


def _weighed(instance: Instance, event: Event) -> str:
    minutes = event.end - event.start
    if event.name in instance.priority:
        return f"{event.name} 2 x {minutes} = {2 * minutes}"
    return f"{event.name} {minutes}"


def _minutes(time: str) -> int:
    hours, minutes = time.split(":")
    return 60 * int(hours) + int(minutes)
