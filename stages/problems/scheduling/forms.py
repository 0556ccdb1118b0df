"""The interface of a form of the scheduling problem: a module that writes instances as text, and reads answers.

instance -> prompt -> completion -> Reading. A form reads any text whatever, in time linear in its length, and never
raises.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from stages.problems.scheduling.intervals import Event, Instance


class Reading(NamedTuple):
    """A completion, as a form reads it."""

    well_formed: bool
    """It has the form that the score asks for."""
    rewarded: bool
    """It has the form that earns the `format` reward, which may ask for more, such as for thinking first."""
    events: list[Event]
    """Booked events in the order of the text; a form may also read some from a text of the wrong form."""


class Form(Protocol):
    """A module with these names."""

    MIN_EVENTS: int
    """A schedule with fewer events is refused."""

    def generate(self, rng: random.Random) -> Instance:
        """A random instance."""
        ...

    def prompt(self, instance: Instance) -> str:
        """The instance as the user's turn says it."""
        ...

    def answer(self, instance: Instance, chosen: Sequence[Event]) -> str:
        """The completion that books `chosen`, a little thinking included."""
        ...

    def read(self, completion: str) -> Reading:
        """Read a completion."""
        ...
