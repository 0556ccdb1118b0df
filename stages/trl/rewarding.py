"""GRPOTrainer whose rewards are a problem's judgements: judged once for all components, composed as the stage says, and
every rollout logged.

completions -> `problem.judge` and the stage's penalties -> (rollouts, components), gathered over processes ->
`rewards.composed` -> TRL. A rollout that could not be judged is NaN in every component: TRL leaves it out of its
group's mean and gives it the advantage 0. Two hooks: `_calculate_rewards`, and `_generate_and_score_completions`, after
which the raw components are what is logged, whatever was made of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather, gather_object

from stages.data import rollouts
from stages.data.rollouts import Rollout
from stages.problems.base import Answer, Judgement, Problem, Row
from stages.rewards import compose
from stages.rewards.compose import Rewards, Running
from stages.runtime import ranks
from stages.tokens import prefix
from stages.trl.prefill import START, PrefillGRPOTrainer
from stages.trl.signal import Signal, speaks


@dataclass(frozen=True)
class Judging:
    """The problem that judges rollouts, and the directory of their log."""

    problem: Problem
    rows: Sequence[Row]
    """Rows that the dataset's `row` column indexes."""
    weights: Mapping[str, float]
    """Component -> weight, penalties included (`rewards.weights_of`)."""
    settings: Rewards
    ends: frozenset[int]
    """Ids that end a completion."""
    log: Path | None
    """Directory of the log of rollouts; None: none is kept."""
    stop_without_signal: int | None = None
    """First steps after which training without a signal stops (`signal.Signal`). None: never."""


class RewardedGRPOTrainer(PrefillGRPOTrainer):
    """PrefillGRPOTrainer with a `Judging`; the dataset has the columns `prompt` and `row`."""

    def __init__(self, *, judging: Judging, **arguments: Any) -> None:
        super().__init__(reward_funcs=[_named(name) for name in judging.weights], **arguments)
        self.judging = judging
        self._running = compose.nothing_seen(len(judging.weights))
        self.signal = Signal()

    def held(self) -> dict[str, Any]:
        """The state of every trainer, the statistics of the components so far, and how many steps were silent."""
        components = [part.tolist() for part in self._running]
        return super().held() | {"components": components, "signal": self.signal.held()}

    def take_up(self, state: dict[str, Any]) -> None:
        """Take it up."""
        super().take_up(state)
        self._running = Running(
            *(now.new_tensor(part) for now, part in zip(self._running, state["components"], strict=True))
        )
        self.signal = Signal(**state.get("signal", {}))  # a checkpoint of an earlier version has none

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[list[dict[str, str]]],
        completion_ids_list: list[list[int]],
    ) -> torch.Tensor:
        answers = [
            Answer(self.judging.rows[given["row"]], turns[0]["content"], ids)
            for given, turns, ids in zip(inputs, completions, completion_ids_list, strict=True)
        ]
        judgements = self.judging.problem.judge(answers)
        values = [self._values(answer, judgement) for answer, judgement in zip(answers, judgements, strict=True)]
        if self.model.training and self.judging.log:
            self._log_rollouts(prompts, answers, judgements, values)
        names = list(self.judging.weights)
        table = [[torch.nan if rewards[name] is None else rewards[name] for name in names] for rewards in values]
        mine_and_others = gather(torch.tensor(table, dtype=torch.float32, device=self.accelerator.device))
        self._raw = cast(torch.Tensor, mine_and_others)
        flags = [[float(one.failure is not None), float(one.solved)] for one in judgements]
        everybodys = cast(torch.Tensor, gather(torch.tensor(flags, device=self._raw.device)))
        self._failed = everybodys[:, 0].mean().item()
        if not self.model.training:
            return self._composed(self.num_generations_eval)
        self._running = self._running.with_batch(self._raw)
        made = self._composed(self.num_generations)
        self._hear(made, solved=bool(everybodys[:, 1].all()))
        return made

    def _composed(self, group_size: int) -> torch.Tensor:
        """What is summed by weight, of the components as they are."""
        settings = self.judging.settings
        if settings.as_they_are:
            return self._raw
        return compose.composed(self._raw, list(self.judging.weights), settings, group_size, self._running)

    def _hear(self, made: torch.Tensor, solved: bool) -> None:
        """Count a step without a signal. Raises NoSignal where the first ones had none."""
        total = compose.weighted_sum(made, self.reward_weights.to(made.device))
        self.signal.hear(speaks(total, self.num_generations), solved, self.num_iterations)
        self.signal.refuse(self.judging.stop_without_signal)

    def _values(self, answer: Answer, judgement: Judgement) -> dict[str, float | None]:
        """Component -> its value; None in all of them, penalties too, where the problem has none to give: the rollout
        was not judged, or nothing applies to its row."""
        if all(value is None for value in judgement.rewards.values()):
            return dict.fromkeys(self.judging.weights)
        found = {**judgement.rewards, **compose.penalties(self.judging.settings, answer.ids)}
        return {name: found.get(name) for name in self.judging.weights}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        scored = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        if not self.judging.settings.as_they_are:
            for name, column in zip(self.judging.weights, self._raw.T, strict=True):
                metrics[f"rewards/{name}/mean"][-1], metrics[f"rewards/{name}/std"][-1] = _mean_and_deviation(column)
            total = compose.weighted_sum(self._raw, self.reward_weights.to(self._raw.device))
            metrics["reward"][-1], metrics["reward_std"][-1] = _mean_and_deviation(total)
        metrics["rewards/failed"].append(self._failed)
        return scored

    def _log_rollouts(
        self, prompts: list[Any], answers: Sequence[Answer], judgements: Sequence[Judgement], values: Sequence[Any]
    ) -> None:
        """A line for every rollout of all processes, before it is trained on."""
        mine = [self._line(prompt, *one) for prompt, *one in zip(prompts, answers, judgements, values, strict=True)]
        lines = gather_object(mine)
        if ranks.first() and self.judging.log:
            with (self.judging.log / rollouts.FILE).open("a", encoding="utf-8") as file:
                for i, line in enumerate(lines):
                    file.write(json.dumps({**line, "sample": i % self.num_generations}) + "\n")

    def _line(self, prompt: list[Any], answer: Answer, judgement: Judgement, values: Any) -> dict[str, Any]:
        start = prefix.prefix_ids(self._tokenizer, prompt[-1][START])
        finished = bool(answer.ids) and answer.ids[-1] in self.judging.ends
        rollout = Rollout(([], ""), prefix.answer(start, answer.ids), answer.text, judgement, finished)
        line = rollouts.line(answer.row.id, 0, rollout, step=self.state.global_step + 1)
        return {**line, "rewards": values}


def _named(name: str) -> Any:
    """A function named for a component, as TRL requires; `_calculate_rewards` never calls it."""

    def component(**_: Any) -> list[float]:
        raise AssertionError("rewards come from the problem's judgements")

    component.__name__ = name
    return component


def _mean_and_deviation(values: torch.Tensor) -> tuple[float, float]:
    there = values[~values.isnan()]
    return there.mean().item(), there.std().item() if len(there) > 1 else 0.0
