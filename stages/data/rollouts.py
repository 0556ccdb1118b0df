"""Rollouts: rows sampled from a policy, as ids and as text, and judged. What rejection sampling and evaluation share.

The ids are what the policy was given and what it answered, response prefix included; the text is what the problem
judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import sampling
from stages.data.rollout_line import RolloutLine
from stages.job import Format, Job, RowRange
from stages.policy import models
from stages.problems import catalog
from stages.problems.base import Answer, Judgement, Problem, Row
from stages.runtime import ranks
from stages.runtime.chunks import Chunks
from stages.tokens import prefix
from stages.tokens.prefix import Rendered
from stages.tokens.token_rows import CARD, PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FILE = "rollouts.jsonl"


@dataclass(frozen=True)
class Rollout:
    """One completion of a row."""

    prompt: Rendered
    """Ids and roles up to the generation prompt, without the prefix."""
    answer: Rendered
    """Ids and roles of prefix, what was sampled, turn end where it came."""
    text: str
    judgement: Judgement
    finished: bool
    """It came to its turn end before it was cut."""


def has_score(group: Sequence[Rollout]) -> bool:
    """Whether one of the answers to a row has a score. A row without one is left out of every mean; where only some
    have none, these count as 0."""
    return any(rollout.judgement.scored for rollout in group)


def line(row: str, sample: int, rollout: Rollout, step: int | None = None) -> RolloutLine:
    """A rollout as a line of `rollouts.jsonl`, which grpo and rejection stages write and rejection reads. `step` is
    the optimiser step that sampled it; None for a policy that stood still."""
    judgement = rollout.judgement
    ids, roles = rollout.answer
    return {
        "row": row,
        "sample": sample,
        "step": step,
        "ids": ids,
        "prefix": roles.count(PREFIX),
        "text": rollout.text,
        "finished": rollout.finished,
        "score": judgement.score if judgement.scored else None,
        "outcome": judgement.outcome,
        "rewards": dict(judgement.rewards),
        "failure": judgement.failure,
    }


def card(
    tokenizer: PreTrainedTokenizerBase, job: Job, temperature: float, max_completion_length: int
) -> dict[str, Any]:
    """What made rollouts: tokenizer and Format (`prefix.card`), and under `sampling`, who was sampled, and how."""
    assert job.format is not None, "the plan gives every stage a Format"
    sampling = {
        "policy": job.sources["policy"],
        "seed": job.seed,
        "temperature": temperature,
        "max_completion_length": max_completion_length,
    }
    return {**prefix.card(tokenizer, prefix.seen_format(job.format, tokenizer)), "sampling": sampling}


def write(directory: Path, lines: Iterable[RolloutLine], card: dict[str, Any]) -> None:
    """Rollouts, a JSON line each, and their card."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    write_card(directory, card)


def write_card(directory: Path, card: dict[str, Any]) -> None:
    """The card alone, into the directory of a log that grows."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")


def read(directory: Path) -> Iterator[RolloutLine]:
    """The rollouts of a directory."""
    with (directory / FILE).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_card(directory: Path) -> dict[str, Any]:
    """What made them."""
    return json.loads((directory / CARD).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Player:
    """A policy on its device, with what it needs to answer rows."""

    engine: sampling.Engine
    tokenizer: PreTrainedTokenizerBase
    format: Format
    problem: Problem
    seed: int
    chunks: Chunks
    """Where what it has sampled is kept, should it be killed."""

    def rows(self, range: RowRange) -> list[Row]:
        """The problem's rows."""
        return catalog.rows(self.problem, range)

    def play(
        self, rows: Sequence[Row], decoding: sampling.Decoding, on_progress: Callable[[int], None]
    ) -> list[list[Rollout]]:
        """The rollouts of each row. `on_progress` hears how many rows are done."""
        prompts = prefix.prompts(self.tokenizer, self.format, rows)
        starts = [prefix.of_row(self.format, row) for row in rows]
        start_ids = [prefix.prefix_ids(self.tokenizer, start) for start in starts]
        given = [[*ids, *start] for (ids, _), start in zip(prompts, start_ids, strict=True)]
        keys = [row.id for row in rows]
        sampled = sampling.sample(self.engine, given, keys, decoding, self.seed, on_progress, self.chunks)

        answers = [
            Answer(row, prefix.completion_text(self.tokenizer, start, ids, self.engine.ends), ids)
            for row, start, completions in zip(rows, starts, sampled, strict=True)
            for ids in completions
        ]
        judged = iter(zip(answers, self._judged(answers), strict=True))

        def rollout(i: int) -> Rollout:
            answer, judgement = next(judged)
            rendered = prefix.answer(start_ids[i], answer.ids)
            return Rollout(prompts[i], rendered, answer.text, judgement, finished=answer.ids[-1] in self.engine.ends)

        return [[rollout(i) for _ in completions] for i, completions in enumerate(sampled)]

    def _judged(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Each by one of the processes, for all of them."""
        mine = range(ranks.rank(), len(answers), ranks.world())
        judgements = self.problem.judge([answers[i] for i in mine])
        everybodys = ranks.together(dict(zip(mine, judgements, strict=True)))
        return [everybodys[i] for i in range(len(answers))]

    def seen_format(self) -> Format:
        """The Format with the digest of the template that was used."""
        return prefix.seen_format(self.format, self.tokenizer)


def player(job: Job) -> Player:
    """The policy, problem and Format that a job names, ready to play."""
    from stages.sampling import backends

    assert job.format is not None and job.problem is not None, (
        "the plan gives a step that samples a problem and a Format"
    )
    path = models.local_path(job.inputs["policy"])
    tokenizer = models.load_tokenizer(path, job.format)
    engine = backends.opened(job, path, tokenizer)
    chunks = Chunks(Path(job.work), path)
    return Player(engine, tokenizer, job.format, catalog.load(job.problem, job.copies), job.seed, chunks)
