"""Weighted interval scheduling, without any text: events, instances, the optimum, and simple ways to choose.

Times are minutes since midnight, and may pass the day's end (24:10 is 1450). A priority event counts twice its minutes.
Two events that touch do not overlap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that can be booked, from `start` to `end`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Instance:
    """The events to choose from, and the names of those with priority."""

    events: tuple[Event, ...]
    priority: frozenset[str]

    def weight(self, event: Event) -> int:
        """Minutes, twice for a priority event."""
        return (event.end - event.start) * (2 if event.name in self.priority else 1)

    def content(self) -> list[Any]:
        """JSON of everything that makes this instance what it is."""
        return [[list(event) for event in self.events], sorted(self.priority)]


def clock(minutes: int) -> str:
    """1450 -> 24:10."""
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def overlaps(a: Event, b: Event) -> bool:
    """Whether both cannot be booked."""
    return a.start < b.end and b.start < a.end


def touches(a: Event, b: Event) -> bool:
    """Whether they overlap, or one ends when the other starts."""
    return a.start <= b.end and b.start <= a.end


def optimum(instance: Instance) -> int:
    """The greatest total weight of events of which no two overlap (dynamic programming over end times, O(n log n))."""
    best, _ = _table(instance, _by_end(instance))
    return best[-1]


def best_schedule(instance: Instance) -> list[Event]:
    """Events that reach the optimum, by start time."""
    events = _by_end(instance)
    best, before = _table(instance, events)
    chosen: list[Event] = []
    i = len(events)
    while i:
        if best[i] == best[i - 1]:
            i -= 1
        else:
            chosen.append(events[i - 1])
            i = before[i - 1]
    return chosen[::-1]


def _by_end(instance: Instance) -> list[Event]:
    return sorted(instance.events, key=lambda event: event.end)


def _table(instance: Instance, events: list[Event]) -> tuple[list[int], list[int]]:
    """(the greatest weight among the first i events, for each event how many of them end before it starts)."""
    ends = [event.end for event in events]
    before = [bisect_right(ends, event.start, hi=i) for i, event in enumerate(events)]
    best = [0]
    for event, compatible in zip(events, before, strict=True):
        best.append(max(best[-1], best[compatible] + instance.weight(event)))
    return best, before


def greedy(instance: Instance, key: Callable[[Event], float]) -> list[Event]:
    """Take events in the order of `key` while they fit; returned by start time."""
    chosen: list[Event] = []
    for event in sorted(instance.events, key=key):
        if not any(overlaps(event, other) for other in chosen):
            chosen.append(event)
    return in_order(chosen)


def in_order(events: Sequence[Event]) -> list[Event]:
    """By start time."""
    return sorted(events, key=lambda event: event.start)


def conflicting(events: Sequence[Event], conflict: Callable[[Event, Event], bool]) -> set[Event]:
    """Events that are in a conflict with another one of them."""
    return {event for pair in combinations(events, 2) if conflict(*pair) for event in pair}
