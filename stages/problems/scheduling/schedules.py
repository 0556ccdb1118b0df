"""Schedules that need no model: those that demonstrations book, and those that an audit plays.

instance -> events to book. Each is a function of the instance and a generator of random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from stages.problems.scheduling.intervals import Event, Instance, best_schedule, greedy, in_order

Choose = Callable[[Instance, random.Random], list[Event]]
DEMONSTRATORS: tuple[tuple[float, Choose], ...] = (
    (0.5, lambda instance, rng: in_order(instance.events)),
    (0.2, lambda instance, rng: greedy(instance, key=lambda e: e.start)),
    (0.2, lambda instance, rng: greedy(instance, key=lambda e: e.end - e.start)),
    (0.1, lambda instance, rng: greedy(instance, key=lambda e: rng.random())),
)
"""Share of the demonstrations, and who makes them: everything at once (double-booked, worth 0), first come first
served, shortest first, random order. They show the form and leave the task to be learned: their mean score is about
0.42 in the compact form, 0.45 in the text form."""


def _one_overlapping(instance: Instance) -> list[Event]:
    """The best schedule and an event that does not fit into it; empty when everything fits."""
    gold = best_schedule(instance)
    left_out = [event for event in instance.events if event not in gold]
    return in_order([*gold, left_out[0]]) if left_out else []


def _moved(event: Event) -> Event:
    return event._replace(end=event.end + 60)


BASELINES: Mapping[str, Choose] = {
    "gold": lambda instance, rng: best_schedule(instance),
    "everything": lambda instance, rng: in_order(instance.events),
    "one_item": lambda instance, rng: greedy(instance, key=lambda e: -instance.weight(e))[:1],
    "random_valid": lambda instance, rng: greedy(instance, key=lambda e: rng.random()),
    "greedy": lambda instance, rng: greedy(instance, key=lambda e: -instance.weight(e)),
    "non_existing": lambda instance, rng: [*best_schedule(instance)[:-1], _moved(best_schedule(instance)[-1])],
    "duplicate": lambda instance, rng: [*best_schedule(instance), best_schedule(instance)[-1]],
    "unsorted": lambda instance, rng: best_schedule(instance)[::-1] if len(best_schedule(instance)) > 1 else [],
    "overlapping": lambda instance, rng: _one_overlapping(instance),
}
"""Schedules that need no model. greedy: heaviest first. An empty one stands for none."""
