"""The checkable problems. A cheap table says what exists, under which version and with which settings; `load` makes the
problem itself.

A built-in problem's identity is its name, version and settings: raise the version whenever its rows, rewards or scores
change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from stages.config import Config
from stages.job import RowRange
from stages.problems.arithmetic import Arithmetic, ArithmeticSettings
from stages.problems.base import Problem, Row
from stages.problems.countdown.problem import Countdown, CountdownSettings
from stages.problems.custom.settings import DatasetProblem, FileProblem
from stages.problems.scheduling.problem import Scheduling, SchedulingSettings
from stages.runtime.workdir import NO_COPIES, Copies

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


def load(problem: dict[str, Any], copies: Copies = NO_COPIES) -> Problem:
    """The problem that a recipe's `problem` names; the user's files are read from their copies. Runs no user code
    yet."""
    settings = settings_of(problem)
    if isinstance(settings, FileProblem):
        from stages.problems.custom.python_file import OwnFile

        return OwnFile(settings, copies)
    if isinstance(settings, DatasetProblem):
        from stages.problems.custom.dataset import Dataset

        return Dataset(settings, copies)
    arguments = {name: getattr(settings, name) for name in type(settings).model_fields if name != "name"}
    return PROBLEMS[problem["name"]].make(**arguments)


def rows(problem: Problem, row_range: RowRange) -> list[Row]:
    """The rows of a range."""
    return problem.rows(row_range.split, row_range.start, row_range.stop, row_range.seed)


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
