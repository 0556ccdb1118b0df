"""Prompt loss weights: which token of a batch weighs what in the loss. Pure tensor functions.

The loss is the weighted mean of the tokens' negative log-likelihoods over the whole optimiser step,

    L = - sum_i w_i log p_i / sum_i w_i,

w_i = prompt_loss_weight or completion_loss_weight by what token i is. Weights (0, 1) are completion-only training, (1, 1) full-sequence training.
"""

from __future__ import annotations

import torch
from torch import Tensor


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: False at padding. In a padding-free batch padding and document starts both have position 0, and neither is predicted."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].bool()
    return batch["position_ids"] != 0


def token_weights(batch: dict[str, Tensor], prompt: float, completion: float) -> Tensor:
    """(B, T) float32 weight of each token as a label, not yet shifted.

    TRL labels a prompt token -100 and a completion token with its id, so the split is read off the collated batch and survives truncation,
    packing and padding-free batches.
    """
    is_completion = batch["labels"] != -100
    weights = torch.zeros(is_completion.shape, dtype=torch.float32, device=is_completion.device)
    weights.masked_fill_(real_tokens(batch) & ~is_completion, prompt)
    return weights.masked_fill_(is_completion, completion)
