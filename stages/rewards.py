"""Rewards: a problem's components as the functions that GRPOTrainer calls.

TRL hands over the batch's completions and the dataset's columns; the completion text already starts with the response prefix
(`stages.trl.prefill`). One function a component, named for it, so that TRL logs `rewards/<component>/mean`; TRL sums them by `reward_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stages.problems.base import Answer, Problem, Row

RewardFunction = Callable[..., list[float | None]]


def reward_functions(problem: Problem, rows: Sequence[Row]) -> tuple[list[RewardFunction], list[float]]:
    """(functions, weights), a pair per component. The dataset's `row` column indexes `rows`."""
    functions = [_component(problem, rows, name) for name in problem.reward_weights]
    return functions, list(problem.reward_weights.values())


def _component(problem: Problem, rows: Sequence[Row], name: str) -> RewardFunction:
    def reward(completions: list[list[dict[str, str]]], row: list[int], **_: Any) -> list[float | None]:
        texts = [turns[0]["content"] for turns in completions]
        answers = [Answer(rows[i], text) for i, text in zip(row, texts, strict=True)]
        return [judgement.rewards[name] for judgement in problem.judge(answers)]

    reward.__name__ = name
    return reward
