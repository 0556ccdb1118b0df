"""Rollouts: rows sampled from a policy, as ids and as text, and judged. What rejection sampling and evaluation share.

The ids are what the policy was given and what it answered, response prefix included; the text is what the problem judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages import models, prefix, problems, sampling
from stages.job import Format, Job, RowRange
from stages.problems.base import Judgement, Problem, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollout:
    """One completion of a row."""

    prompt_ids: list[int]
    """Up to the generation prompt, without the prefix."""
    completion_ids: list[int]
    """Prefix, what was sampled, turn end where it came."""
    text: str
    judgement: Judgement
    finished: bool
    """It came to its turn end before it was cut."""


@dataclass(frozen=True)
class Player:
    """A policy on its device, with what it needs to answer rows."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: Format
    problem: Problem
    seed: int

    def rows(self, range: RowRange) -> list[Row]:
        """The problem's rows."""
        return problems.rows(self.problem, range)

    def play(
        self, rows: Sequence[Row], decoding: sampling.Decoding, on_progress: Callable[[int], None]
    ) -> list[list[Rollout]]:
        """The rollouts of each row. `on_progress` hears how many rows are done."""
        prompts, given = prefix.sampling_prompts(self.tokenizer, self.format, rows)
        sampled = sampling.sample(self.model, self.tokenizer, given, decoding, self.seed, on_progress)
        start = prefix.prefix_ids(self.tokenizer, self.format.response_prefix)
        return [
            [self._rollout(row, prompt, start, ids) for ids in completions]
            for row, prompt, completions in zip(rows, prompts, sampled, strict=True)
        ]

    def _rollout(self, row: Row, prompt: list[int], start: list[int], ids: list[int]) -> Rollout:
        text = prefix.completion_text(self.tokenizer, self.format.response_prefix, ids)
        finished = ids[-1] in sampling.turn_ends(self.model, self.tokenizer)
        return Rollout(prompt, [*start, *ids], text, self.problem.judge(row, text), finished)


def player(job: Job) -> Player:
    """The policy, problem and Format that a job names, ready to play."""
    assert job.format is not None and job.problem is not None, (
        "the plan gives a step that samples a problem and a Format"
    )
    path = models.local_path(job.inputs["policy"])
    tokenizer = models.load_tokenizer(path)
    model = models.load_policy(path, job.dtype, models.pick_device(job.execution))
    return Player(model, tokenizer, job.format, problems.load(job.problem), job.seed)
