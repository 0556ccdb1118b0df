"""Weighted interval scheduling, without any text: events, instances, the optimum, and simple ways to choose.

Times are minutes since midnight. A priority event counts twice its minutes. Two events that touch do not overlap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that can be booked, from `start` to `end`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Instance:
    """What may be booked, and which of it has priority."""

    events: tuple[Event, ...]
    priority: frozenset[str]

    def weight(self, event: Event) -> int:
        """Minutes, twice for a priority event."""
        return (event.end - event.start) * (2 if event.name in self.priority else 1)

    def content(self) -> list[Any]:
        """JSON of everything that makes this instance what it is."""
        return [[list(event) for event in self.events], sorted(self.priority)]


def overlaps(a: Event, b: Event) -> bool:
    """Whether both cannot be booked."""
    return a.start < b.end and b.start < a.end


def optimum(instance: Instance) -> int:
    """The greatest total weight of events of which no two overlap (dynamic programming over end times, O(n log n))."""
    events = sorted(instance.events, key=lambda event: event.end)
    ends = [event.end for event in events]
    best = [0]
    for i, event in enumerate(events):
        compatible = bisect_right(ends, event.start, hi=i)
        best.append(max(best[-1], best[compatible] + instance.weight(event)))
    return best[-1]


def greedy(instance: Instance, key: Callable[[Event], float]) -> list[Event]:
    """Take events in the order of `key` while they fit; returned by start time."""
    chosen: list[Event] = []
    for event in sorted(instance.events, key=key):
        if not any(overlaps(event, other) for other in chosen):
            chosen.append(event)
    return sorted(chosen, key=lambda event: event.start)
