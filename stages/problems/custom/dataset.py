"""Rows of a dataset and TRL-style rewards by name, seen from the stage. The rewards are called in guarded worker
processes (`stages.problems.custom.rewards_worker`).

A batch of answers is one call; where it fails, its answers are asked for one at a time, so that only the culprit is
lost. Not where the number of rewards is wrong: which reward belongs to which answer is then unknown, and a constant
`[1.0]` would have the right length for one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

from stages.errors import BadInput, TooFew
from stages.guard.pool import Guard
from stages.guard.worker import Reply
from stages.job import SPLITS, Split
from stages.problems import files
from stages.problems.base import Answer, Judgement, Row, allotted, folded
from stages.problems.custom.python_file import SHOWN, are_rewards, failed, outcome_of, too_few
from stages.problems.custom.row import OwnRow, own_row
from stages.problems.custom.settings import NAME_GOLD, READ_BY_MATH_VERIFY, DatasetProblem
from stages.runtime.workdir import NO_COPIES, Copies

OUTCOMES = ("failed", "unscored", "wrong", "partial", "passed")
"""failed: it could not be judged; unscored: the first reward does not apply to the row; wrong: score 0; partial: some
score below 1."""
BATCH = 16
"""Answers of one call."""
TEXTS = ("prompt", "gold")
"""Settings whose column holds text in every row; an answer may be anything."""
OURS = ("prompt", "prompts", "completions", "completion_ids", "id", "trainer_state", "log_extra", "log_metric")
"""Arguments of a reward that are no columns."""


class Dataset:
    """A Problem."""

    def __init__(self, settings: DatasetProblem, copies: Copies = NO_COPIES) -> None:
        self.outcomes, self.settings, self.copies = OUTCOMES, settings, copies
        self.reward_weights = {reward.component: reward.weight for reward in settings.components}
        rewards = [
            {
                "component": reward.component,
                "name": reward.name,
                **(settings.places(reward.file, copies) if reward.file else {"path": None}),
                "arguments": reward.arguments,
            }
            for reward in settings.components
        ]
        spec = {"name": "problem.rewards", "rewards": rewards, "files": settings.opened}
        self.guard = Guard("rewards", spec, settings.limits())

    @cached_property
    def _all(self) -> list[OwnRow]:
        """Every distinct row. The rewards are imported first, because their import may fail."""
        self.guard.about()
        if self.settings.is_file:
            rows: Iterable[Row] = files.rows(self, Path(self.settings.dataset), self.copies)
        else:
            rows = map(self.row, _of_hub(self.settings))
        return list({row.id: cast(OwnRow, row) for row in rows}.values())

    @cached_property
    def _columns(self) -> list[str]:
        """The columns of all rows: the arguments of a reward must not depend on the other rows of its batch."""
        return sorted({name for row in self._all for name in row.values} - {*OURS})

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """The rows of a split; training rows in the order that the seed names. Raises TooFew where there are fewer."""
        order = list(self._all)
        self._refuse_missing(self._columns)
        random.Random(seed if split == "train" else split).shuffle(order)
        selected: list[Row] = list(islice(allotted(iter(order), split), start, stop))
        if len(selected) < stop - start:
            counts = {each: sum(1 for _ in allotted(iter(order), each)) for each in SPLITS}
            prompts = len({folded(row.prompt) for row in order})
            raise TooFew(too_few(self.settings.dataset, split, stop, counts, prompts), counts[split])
        return selected

    def _refuse_missing(self, columns: Collection[str]) -> None:
        """Raise BadInput for a reward that cannot be called with these columns."""
        available = list(columns)
        if self.settings.answer:
            available.append("solution")
        for component, needed in self.guard.about()["needs"].items():
            missing = [name for name in needed if name not in available]
            if missing:
                raise BadInput(
                    f"problem.rewards: {component} takes {', '.join(missing)}, which is no column of "
                    f"{self.settings.dataset}; there is {', '.join(available) or 'nothing'}: "
                    f"{_fix(missing, self.settings)}"
                )

    def row(self, columns: Mapping[str, Any]) -> OwnRow:
        """Raises BadInput for a line that lacks a column that the recipe names."""
        for role in ("prompt", "answer", "gold"):
            column = getattr(self.settings, role)
            if column is not None and columns.get(column) is None:
                raise BadInput(
                    f"problem.{role}: a row of {self.settings.dataset} has no {column!r}; it has "
                    f"{', '.join(columns) or 'nothing'}"
                )
            if column is not None and role in TEXTS and not isinstance(columns[column], str):
                raise BadInput(
                    f"problem.{role}: {column!r} of {self.settings.dataset} is {type(columns[column]).__name__}, "
                    "expected text"
                )
        return own_row(columns, self.settings.prompt)

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """The text in the column `gold`. Raises BadInput where the recipe names no such column."""
        if not self.settings.gold:
            raise BadInput(f"problem.gold: {self.settings.dataset} has no demonstrations without it; {NAME_GOLD}")
        return str(row.columns()[self.settings.gold])

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """The text in the column `gold`; empty where the recipe names no such column."""
        return {"gold": self.demonstration(row, rng)} if self.settings.gold else {}

    def why_none(self, component: str, row: Row) -> str | None:
        """The likely cause of a reward that is None for every row, of which this is one; None: not known."""
        reward = next(one for one in self.settings.components if one.component == component)
        gold = row.columns().get(self.settings.answer or "solution")
        if reward.file or component not in READ_BY_MATH_VERIFY or gold is None:
            return None
        return f"math-verify reads no number or formula in the reference answers, such as {str(gold)[:SHOWN]!r}"

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Raises TooManyFailures."""
        self.guard.about()
        batches = [answers[i : i + BATCH] for i in range(0, len(answers), BATCH)]
        try:
            first = self.guard.map("judge", [self._arguments(batch) for batch in batches])
            again = [answer for batch, reply in zip(batches, first, strict=True) if _narrows(reply) for answer in batch]
            self.guard.note(len(answers) - len(again))
            for batch, reply in zip(batches, first, strict=True):
                if reply.failure and not _narrows(reply):
                    self.guard.blame(reply, len(batch), len(again))
            single = iter(self.guard.map("judge", [self._arguments([answer]) for answer in again], counted=True))
        finally:
            self.guard.sweep()
        replies: list[Reply] = []
        for batch, reply in zip(batches, first, strict=True):
            if _narrows(reply):
                replies += islice(single, len(batch))
            else:
                replies += _split(reply, len(batch))
        return [self._judgement(reply) for reply in replies]

    def _arguments(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The arguments for the rewards of a batch."""
        rows = [answer.row.columns() for answer in answers]
        names = dict.fromkeys([*self._columns, *(name for row in rows for name in row if name not in OURS)])
        self._refuse_missing(names)
        columns = {name: [row.get(name) for row in rows] for name in names}
        if self.settings.answer:
            columns["solution"] = [row[self.settings.answer] for row in rows]
        return {
            "prompts": [[{"role": "user", "content": answer.row.prompt}] for answer in answers],
            "completions": [[{"role": "assistant", "content": answer.text}] for answer in answers],
            "completion_ids": [list(answer.ids) for answer in answers],
            "columns": columns,
        }

    def _judgement(self, reply: Reply) -> Judgement:
        if reply.failure:
            return failed(self.reward_weights, reply.failure)
        if not (isinstance(reply.value, list) and reply.value and are_rewards(reply.value[0], self.reward_weights)):
            return failed(self.reward_weights, "crash")
        first = reply.value[0][next(iter(self.reward_weights))]
        score = min(1.0, max(0.0, first or 0.0))
        outcome = "unscored" if first is None else outcome_of(score, self.passed(score), True)
        return Judgement(score, outcome, self.passed(score), True, reply.value[0], scored=first is not None)

    def passed(self, score: float) -> bool:
        """The first reward is at its best."""
        return score >= 1


def _fix(missing: Sequence[str], settings: DatasetProblem) -> str:
    if "solution" in missing and not settings.answer:
        return "name the column with the reference answer as problem.answer"
    return "take one of these, or give it a default"


def _narrows(reply: Reply) -> bool:
    """Whether the answers of a failed batch are judged again, one per call."""
    return reply.failure not in (None, "wrong_length")


def _split(reply: Reply, count: int) -> list[Reply]:
    """The reply of a batch as a reply per answer."""
    if reply.failure:
        return [reply] * count
    if not isinstance(reply.value, list) or len(reply.value) != count:
        return [Reply(None)] * count
    return [Reply([value]) for value in reply.value]


def _of_hub(settings: DatasetProblem) -> Iterator[dict[str, Any]]:
    """The rows of a dataset on the hub, as JSON values. Raises BadInput when it cannot be read."""
    import datasets

    try:
        rows = datasets.load_dataset(
            settings.dataset, settings.config, split=settings.split, revision=settings.revision
        )
    except Exception as error:
        raise BadInput(
            f"problem.dataset: {settings.dataset} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from None
    for row in rows:
        yield json.loads(json.dumps(row, default=str))
