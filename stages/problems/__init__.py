"""The checkable problems. A cheap table says what exists, under which version and with which settings; `load` makes the problem itself.

A built-in problem's identity is its name, version and settings: raise the version whenever its rows, rewards or scores change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from stages.config import Config, identity
from stages.job import RowRange
from stages.problems.base import Problem, Row
from stages.problems.scheduling import FORMS, Scheduling
from stages.problems.settings import DatasetProblem, FileProblem


class SchedulingSettings(Config):
    """Event scheduling: choose events that do not overlap, for the greatest weighted time."""

    name: Literal["scheduling"] = identity()
    form: Literal["compact", "text"] = identity("text")
    """How an instance is written: `text` as in the reference, `compact` for tiny models."""


class BuiltIn(NamedTuple):
    """A row of the table."""

    version: str
    settings: type[Config]
    make: Callable[[Any], Problem]


PROBLEMS: dict[str, BuiltIn] = {
    "scheduling": BuiltIn("1", SchedulingSettings, lambda settings: Scheduling(form=settings.form)),
}


def load(settings: dict[str, Any]) -> Problem:
    """The problem that a recipe's `problem` names. Nothing of a user's own runs yet."""
    if "file" in settings:
        from stages.problems.own_file import OwnFile

        return OwnFile(FileProblem.model_validate(settings))
    if "dataset" in settings:
        from stages.problems.dataset import Dataset

        return Dataset(DatasetProblem.model_validate(settings))
    built_in = PROBLEMS[settings["name"]]
    return built_in.make(built_in.settings.model_validate(settings))


def rows(problem: Problem, range: RowRange) -> list[Row]:
    """The rows of a range."""
    return problem.rows(range.split, range.start, range.stop, range.seed)


__all__ = ["FORMS", "PROBLEMS", "BuiltIn", "DatasetProblem", "FileProblem", "SchedulingSettings", "load", "rows"]
