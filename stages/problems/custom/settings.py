"""What a recipe says about a problem of one's own: one Python file, or a dataset with rewards by name. Cheap to import;
no user code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import model_validator

from stages.config import (
    MAPPING,
    WORD,
    Config,
    FromList,
    Seconds,
    UserPath,
    WordOrMapping,
    execution,
    identity,
    resolved,
)
from stages.guard.pool import Limits
from stages.problems.base import LARGEST_WEIGHT
from stages.runtime.workdir import Copies, place

T = TypeVar("T")
VERSION = "2"
"""Of the problems of one's own, both kinds: part of their identity, and raised whenever the same file or dataset gives
other rows, splits, rewards or scores."""
NAME_GOLD = "name the column with the best completion as problem.gold, or give the sft stage a .jsonl of conversations"
"""The way to demonstrations of a dataset."""
ALIASES = {
    "accuracy": "accuracy_reward",
    "reasoning_accuracy": "reasoning_accuracy_reward",
    "think_format": "think_format_reward",
    "cosine_scaled": "get_cosine_scaled_reward",
    "repetition_penalty": "get_repetition_penalty_reward",
    "soft_overlong_punishment": "get_soft_overlong_punishment",
}
"""Our short name -> TRL's name of a reward. Both are understood, and components have the short one."""
SHORT = {theirs: ours for ours, theirs in ALIASES.items()}


def by_component(values: Mapping[str, T], components: Collection[str]) -> dict[str, T]:
    """Values under the names of these components, where some may have the other name of a TRL reward: in a recipe, or
    in a log of a version that had components under both."""
    return {_among(components, name): value for name, value in values.items()}


def _among(components: Collection[str], name: str) -> str:
    other = SHORT.get(name) or ALIASES.get(name, name)
    return other if name not in components and other in components else name


READ_BY_MATH_VERIFY = ("accuracy", "reasoning_accuracy", "cosine_scaled")
"""Rewards of TRL that are None where math-verify reads nothing in the reference answer."""


class OwnCode(Config):
    """How code of one's own is called: in worker processes that can be killed (`stages.guard.pool`)."""

    time_limit: Seconds = identity(10.0, gt=0)
    """Seconds (or "10s") of wall-clock time that one call may take; a completion that takes longer counts as failed."""
    max_failures: float = execution(0.1, ge=0, le=1)
    """Share of a stage's answers (of at least 100) that may fail to be judged before the stage stops. 0 = none; 1 =
    any."""
    workers: int | None = execution(None, ge=1)
    """Processes that run it. Off: one a core."""
    files: Annotated[tuple[UserPath, ...], FromList] = resolved(())
    """Files and folders that the code opens, or imports from elsewhere; identified by their bytes. Off: none, and a
    change in what it opens goes unseen."""

    def limits(self) -> Limits:
        """The same for the guard."""
        return Limits(self.time_limit, self.max_failures, self.workers)

    @property
    def opened(self) -> list[str]:
        """Absolute paths of `files`."""
        return [str(Path(file).absolute()) for file in self.files]

    def places(self, file: str, copies: Copies) -> dict[str, str]:
        """A user's file as the worker gets it: its `path`, and the `copy` that is read."""
        return {"path": str(Path(file).absolute()), "copy": str(place(Path(file), copies))}


class FileProblem(OwnCode):
    """A problem of one's own, in one Python file."""

    file: UserPath = resolved()
    """Path of the file; identified by its bytes and those of the modules that it imports from its folder."""


class RewardSettings(Config):
    """A reward with a weight, or with arguments."""

    name: UserPath = identity(min_length=1)
    """A reward of TRL, such as accuracy, or file.py:function."""
    weight: float = identity(1.0, ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)
    """In the reward that training sees."""
    arguments: dict[str, Any] = identity({})
    """Of one of TRL's factories, such as repetition_penalty: {ngram_size: 3, max_penalty: -1.0}."""

    @property
    def component(self) -> str:
        """The one name of the reward, in logs, weights and keys: its function's in a file of one's own, the short one
        of one of TRL's."""
        _, colon, name = self.name.rpartition(":")
        return name if colon else SHORT.get(name, name)

    @property
    def file(self) -> str | None:
        """The file of a reward of one's own; None for one of TRL's."""
        return self.name.rpartition(":")[0] or None


Reward = Annotated[Annotated[UserPath, WORD] | Annotated[RewardSettings, MAPPING], WordOrMapping]


def _reward(value: str | RewardSettings) -> RewardSettings:
    return RewardSettings(name=value) if isinstance(value, str) else value


class DatasetProblem(OwnCode):
    """Rows from a dataset, rewards by name."""

    dataset: UserPath = resolved()
    """Hub id as written, or path of a .jsonl file, identified by its bytes."""
    rewards: Annotated[tuple[Reward, ...], FromList] = identity(min_length=1)
    """Names of rewards, or file.py:function, or {name, weight, arguments}. The first is the score too, clipped to
    0..1."""
    prompt: str = identity("prompt")
    """Column with the question."""
    answer: str | None = identity(None)
    """Column with the reference answer, which rewards get as `solution` too. Off: none."""
    gold: str | None = resolved(None)
    """Column with the best completion there is, as text, response prefix included. The audit plays it, and an sft stage
    imitates it with `data: demonstrations`, whose key alone knows it. Off: none; the audit cannot say whether the best
    answer is the best paid."""
    config: str | None = identity(None)
    """Configuration of a hub dataset. Off: its default."""
    split: str = identity("train")
    """Split of a hub dataset; its rows are shared out to our own splits by their content."""
    revision: str | None = identity(None)
    """Commit of a hub dataset. Off: whatever is newest when a stage runs."""

    @property
    def components(self) -> tuple[RewardSettings, ...]:
        """The rewards, written out."""
        return tuple(_reward(value) for value in self.rewards)

    @property
    def is_file(self) -> bool:
        """Whether the rows are a file here, and not a dataset on the hub."""
        return self.dataset.endswith((".jsonl", ".json"))

    @model_validator(mode="after")
    def _rewards_are_known(self) -> DatasetProblem:
        names = [reward.component for reward in self.components]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"rewards: two are called {twice[0]}; a reward is logged under its name, so give each another"
            )
        for reward in self.components:
            if reward.file is None and reward.name not in (*ALIASES, *ALIASES.values()):
                raise ValueError(
                    f"rewards: there is no reward {reward.name!r}; there is {', '.join(ALIASES)}, or your own as "
                    "file.py:function"
                )
            if reward.file and reward.arguments:
                raise ValueError(f"rewards: {reward.name} takes no arguments here; they are for TRL's factories")
        return self
