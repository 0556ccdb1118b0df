"""The checkable problems. A cheap table says what exists, under which version and with which settings; `load` makes the problem itself.

A built-in problem's identity is its name, version and settings: raise the version whenever its rows, rewards or scores change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from stages.config import Config, FromList, identity
from stages.job import RowRange
from stages.problems.arithmetic import MAX_DIGITS, Arithmetic, Operation
from stages.problems.base import Problem, Row
from stages.problems.countdown import Countdown
from stages.problems.scheduling import Overlap, RewardOverlap, Scheduling
from stages.problems.settings import DatasetProblem, FileProblem


class SchedulingSettings(Config):
    """Event scheduling: choose events that do not overlap, for the greatest weighted time."""

    name: Literal["scheduling"] = identity()
    form: Literal["compact", "text"] = identity("text")
    """How an instance is written: `text` as in the reference, `compact` for tiny models."""
    overlap: Overlap = identity("remove")
    """What events that overlap cost in training. `remove`: they are not counted, and the others are, as in the reference. `zero`: the whole score reward. `reward`: they
    are not counted, and a component of its own is 1 when none overlap; weights are then format .1, sorted .2, overlap .2, score .5."""
    reward_overlap: RewardOverlap = identity("strict")
    """Whether events that touch overlap in training: `strict` no, as in the score; `touching` yes, as in the reference."""


class ArithmeticSettings(Config):
    """One operation on two whole numbers; tiny, for tests and tutorials."""

    name: Literal["arithmetic"] = identity()
    digits: int = identity(2, ge=1, le=MAX_DIGITS)
    """Digits of an operand, at most. One digit and one operation make 100 rows in all."""
    operations: Annotated[tuple[Operation, ...], FromList] = identity(("+", "-"), min_length=1)
    """What may be asked: +, - and *."""


class CountdownSettings(Config):
    """Reach a target with some numbers and + - * /."""

    name: Literal["countdown"] = identity()
    numbers: int = identity(4, ge=3, le=5)
    """How many numbers a row has."""
    largest: int = identity(99, ge=10, le=9999)
    """The greatest of them, at most; the least is 1."""
    largest_target: int = identity(100, ge=10, le=999_999)
    """The greatest target, at most."""
    use_all: bool = identity(False)
    """Every number must be used. Off: each at most once."""


BuiltInSettings = Annotated[SchedulingSettings | ArithmeticSettings | CountdownSettings, Field(discriminator="name")]


class BuiltIn(NamedTuple):
    """A row of the table."""

    version: str
    settings: type[Config]
    make: Callable[..., Problem]
    """Called with the settings by name."""


PROBLEMS: dict[str, BuiltIn] = {
    "scheduling": BuiltIn("2", SchedulingSettings, Scheduling),
    "arithmetic": BuiltIn("1", ArithmeticSettings, Arithmetic),
    "countdown": BuiltIn("1", CountdownSettings, Countdown),
}


def settings_of(problem: dict[str, Any]) -> Config:
    """A recipe's `problem` as its settings."""
    if "file" in problem:
        return FileProblem.model_validate(problem)
    if "dataset" in problem:
        return DatasetProblem.model_validate(problem)
    return PROBLEMS[problem["name"]].settings.model_validate(problem)


def load(problem: dict[str, Any]) -> Problem:
    """The problem that a recipe's `problem` names. Nothing of a user's own runs yet."""
    asked = settings_of(problem)
    if isinstance(asked, FileProblem):
        from stages.problems.own_file import OwnFile

        return OwnFile(asked)
    if isinstance(asked, DatasetProblem):
        from stages.problems.dataset import Dataset

        return Dataset(asked)
    made_from = {name: getattr(asked, name) for name in type(asked).model_fields if name != "name"}
    return PROBLEMS[problem["name"]].make(**made_from)


def rows(problem: Problem, range: RowRange) -> list[Row]:
    """The rows of a range."""
    return problem.rows(range.split, range.start, range.stop, range.seed)


__all__ = [
    "PROBLEMS",
    "ArithmeticSettings",
    "BuiltIn",
    "BuiltInSettings",
    "CountdownSettings",
    "DatasetProblem",
    "FileProblem",
    "SchedulingSettings",
    "load",
    "rows",
    "settings_of",
]
