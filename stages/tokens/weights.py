"""Loss weights: which token of a batch weighs what, and what the sum is divided by. Pure functions.

The loss of an optimiser step, over all its micro-batches and processes, is

    L = - sum_i w_i log p_i / N,

w_i the weight of token i's role and N one of three numbers (`NORMALISERS`):

    weight_sum         sum_i w_i        A weighted mean: the scale of the weights cancels, so only their ratio
                                        matters. As in davidsvaughn/prompt-loss-weight run_plw.py (per device there,
                                        per step here).
    nonzero_count      #{i: w_i != 0}   Weighted Instruction Tuning, arXiv 2507.07817 section 3, and TRL PR #6747:
                                        halving every weight halves the gradient, and the first weight above 0 on the
                                        prompt enlarges N at once.
    completion_count   #{i: i answered} The gradient of the response does not depend on the prompt's weight. The total
                                        gradient grows with it. Of a step without an answered token: the stage's
                                        answered tokens divided by its steps.

With prompt weight 0 and completion weight 1 all three are completion-only training, with 1 and 1 the first two are
full-sequence training.

The first token of a sequence has nothing before it and is never predicted: it counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from stages.tokens.token_rows import ANSWERED, CODES, ROLES, TokenRow

if TYPE_CHECKING:
    from torch import Tensor

Normaliser = Literal["weight_sum", "nonzero_count", "completion_count"]
Weights = Mapping[str, float]
"""Role -> weight, for each of ROLES."""
NOTHING = -100
"""TRL's label where nothing is to be learned."""


def is_answered(codes: Tensor) -> Tensor:
    """Bool: the token is of the policy's own turn, prefix included."""
    return codes >= min(CODES[role] for role in ANSWERED)


def token_weights(codes: Tensor, weights: Weights) -> Tensor:
    """float32 weight of each token as a target, not yet shifted; 0 where nothing is to be learned. `codes` as
    `tokens.labelled` gives them."""
    import torch

    table = torch.tensor([weights[role] for role in ROLES], dtype=torch.float32, device=codes.device)
    return table[codes.clamp(min=0)].masked_fill(codes == NOTHING, 0.0)


def normaliser(codes: Tensor, weights: Weights, kind: Normaliser) -> Tensor:
    """A batch's part of N, a float64 scalar. `codes` is (B, T); the first column is left out."""
    codes = codes[..., 1:]
    if kind == "completion_count":
        return is_answered(codes).sum().double()
    w = token_weights(codes, weights)
    if kind == "nonzero_count":
        return (w != 0).sum().double()
    return w.double().sum()


def answered_a_step(rows: Iterable[TokenRow], epochs: float, steps: int) -> float:
    """The answered tokens of a stage divided by its optimiser steps."""
    return epochs * sum(sum(role in ANSWERED for role in row.roles[1:]) for row in rows) / steps


def row_weights(row: TokenRow, weights: Weights) -> list[float]:
    """Weight of each token of one row; 0 for the first."""
    by_letter = {letter: weights[role] for role, letter in ROLES.items()}
    return [0.0, *(by_letter[role] for role in row.roles[1:])]


def total_weight(rows: Iterable[TokenRow], weights: Weights) -> float:
    """Sum of the weights of all tokens of the rows."""
    return sum(sum(row_weights(row, weights)) for row in rows)


def prompt_share(rows: Iterable[TokenRow], weights: Weights) -> float:
    """Share of the rows' total weight that prompt tokens carry, 0..1."""
    prompt = total = 0.0
    for row in rows:
        for role, weight in zip(row.roles, row_weights(row, weights), strict=True):
            total += weight
            if role not in ANSWERED:
                prompt += weight
    return prompt / total if total else 0.0
