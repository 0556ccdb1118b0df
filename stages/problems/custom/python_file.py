"""A problem in one Python file, seen from the stage: every function of the file is called in a guarded worker process
(`stages.problems.custom.python_file_worker`)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.errors import BadInput, TooFew
from stages.guard.pool import Guard
from stages.guard.worker import Reply
from stages.job import Split
from stages.problems.base import Answer, Judgement, Row
from stages.problems.custom.row import own_row
from stages.problems.custom.settings import FileProblem
from stages.runtime.workdir import NO_COPIES, Copies

OUTCOMES = ("failed", "unscored", "malformed", "wrong", "partial", "passed")
"""failed: it could not be judged; unscored: no component applies, or the score is None; malformed: `well_formed` said
no; wrong: score 0; partial: some score that does not pass."""
ROWS_LIMIT = 600.0
"""Seconds that making the rows of one range may take."""
SEEDS = 2**53
SHOWN = 80
"""Characters of a row that an error shows."""


class OwnFile:
    """A Problem."""

    def __init__(self, settings: FileProblem, copies: Copies = NO_COPIES) -> None:
        self.outcomes = OUTCOMES
        self.name = Path(settings.file).name
        spec = {"name": self.name, **settings.places(settings.file, copies), "files": settings.opened}
        self.guard = Guard("file", spec, settings.limits())
        self._passed: dict[float, bool] = {}

    @cached_property
    def _about(self) -> dict[str, Any]:
        return self.guard.about()

    @property
    def reward_weights(self) -> Mapping[str, float]:
        """The file's REWARDS."""
        return self._about["weights"]

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """Asked for twice, the second time in a worker that was asked for nothing before. Raises BadInput where the two
        differ, and TooFew when the file has fewer."""
        row_range = {"split": split, "start": start, "stop": stop, "seed": seed}
        reply = self.guard.one("rows", row_range, ROWS_LIMIT)
        again = self.guard.one_afresh("rows", row_range, ROWS_LIMIT)
        if reply != again:
            raise BadInput(
                f"{self.name}: rows(rng) makes other rows each time it is asked: {_unlike(reply, again)}; let it "
                "depend on rng alone (a set, the time, the random module and what earlier calls left differ from "
                "process to process)"
            )
        if "counts" in reply:
            counts = reply["counts"]
            raise TooFew(too_few(self.name, split, stop, counts, reply["prompts"]), counts[split])
        return [own_row(columns) for columns in reply["rows"]]

    def row(self, columns: Mapping[str, Any]) -> Row:
        """Raises BadInput for a line without a prompt."""
        if not isinstance(columns.get("prompt"), str):
            raise BadInput(f"a row of {self.name} has {', '.join(columns) or 'nothing'}, expected a text under prompt")
        return own_row(columns)

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """Raises BadInput when the file has none."""
        if "demonstration" not in self._about["has"]:
            raise BadInput(
                f"{self.name} has no demonstration(row, rng), which an sft stage with data: demonstrations needs; "
                "write it, or give the stage a .jsonl"
            )
        return self.guard.one("demonstration", {"row": row.columns(), "seed": rng.randrange(SEEDS)})

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """The baselines of the file; empty where it has no `baselines`."""
        if "baselines" not in self._about["has"]:
            return {}
        return self.guard.one("baselines", {"row": row.columns(), "seed": rng.randrange(SEEDS)})

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Each in a call of its own. Raises TooManyFailures."""
        _ = self._about
        payloads = [{"row": dict(answer.row.columns()), "completion": answer.text} for answer in answers]
        try:
            replies = self.guard.map("judge", payloads, counted=True)
        finally:
            self.guard.sweep()
        return [self._judgement(reply) for reply in replies]

    def _judgement(self, reply: Reply) -> Judgement:
        if reply.failure:
            return failed(self.reward_weights, reply.failure)
        if not _sound(reply.value, self.reward_weights):
            return failed(self.reward_weights, "crash")
        score, well_formed, passed = (reply.value[name] for name in ("score", "well_formed", "passed"))
        rewards = reply.value["rewards"]
        if score is None or all(value is None for value in rewards.values()):
            return Judgement(0.0, "unscored", False, well_formed, rewards, scored=False)
        self._passed[score] = passed
        return Judgement(score, outcome_of(score, passed, well_formed), passed and score >= 1, well_formed, rewards)

    def passed(self, score: float) -> bool:
        """The file's `passed`, which every judgement tells; asked for a score that none had. A score of 1 where it has
        none."""
        if "passed" not in self._about["has"]:
            return score >= 1
        if score not in self._passed:
            self._passed[score] = self.guard.one("passed", float(score))
        return self._passed[score]


def _sound(value: Any, components: Mapping[str, float]) -> bool:
    """Whether it is what a worker says; user code that writes into the guard's pipe can say anything."""
    return (
        isinstance(value, dict)
        and value.keys() == {"score", "well_formed", "passed", "rewards"}
        and (value["score"] is None or (is_finite(value["score"]) and 0 <= value["score"] <= 1))
        and isinstance(value["well_formed"], bool)
        and isinstance(value["passed"], bool)
        and are_rewards(value["rewards"], components)
    )


def are_rewards(value: Any, components: Mapping[str, float]) -> bool:
    """Component -> number or None, for each component and nothing else."""
    return (
        isinstance(value, dict)
        and value.keys() == components.keys()
        and all(one is None or is_finite(one) for one in value.values())
    )


def is_finite(value: Any) -> bool:
    """A number that is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def outcome_of(score: float, passed: bool, well_formed: bool) -> str:
    """The first rule that an answer breaks, or `passed`."""
    if not well_formed:
        return "malformed"
    if passed:
        return "passed"
    return "partial" if score > 0 else "wrong"


def failed(components: Mapping[str, float], failure: str) -> Judgement:
    """Of an answer that user code could not judge."""
    return Judgement(0.0, "failed", False, False, dict.fromkeys(components), failure)


def _unlike(reply: dict[str, Any], again: dict[str, Any]) -> str:
    """Where two answers to one request for rows differ."""
    pairs = zip(reply.get("rows", ()), again.get("rows", ()), strict=False)
    for i, (row, other) in enumerate(pairs):
        if row != other:
            return f"row {i} was {str(row)[:SHOWN]}, and then {str(other)[:SHOWN]}"
    return "another number of them"


def too_few(name: str, split: Split, stop: int, counts: Mapping[str, int], prompts: int) -> str:
    """The complaint about a range that is longer than the source, which has so many different prompts."""
    there = ", ".join(f"{each} {count}" for each, count in counts.items())
    every = sum(counts.values())
    alike = f" ({every} rows have {prompts} prompts, and rows with one prompt are in one split)"
    return (
        f"{name} has {counts[split]} {split} rows, but row {stop - 1} was asked for; it has {there}"
        f"{alike if prompts < every else ''}: ask for fewer, or give it more"
    )
