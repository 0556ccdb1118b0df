"""GRPO mixed with general rows, which have no reward and are trained by likelihood:

    L = L_grpo + coefficient * L_nll,    L_nll = - sum log p(completion token) / N,

the sum and N over all general rows of an optimiser step. Every process has all of them and knows N; they are dealt out
to micro-steps and processes, and a micro-step that is dealt none runs one at weight 0, so that all processes run the
model equally often. The gradient does not depend on either number. Which rows a step has follows from the step alone,
so a resumed stage needs no further state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stages.data import mix
from stages.tokens.token_rows import COMPLETION, TokenRow
from stages.tokens.weights import NOTHING
from stages.trl.rewarding import RewardedGRPOTrainer


@dataclass(frozen=True)
class General:
    """The general rows, which are trained by likelihood."""

    rows: Sequence[TokenRow]
    """All that the stage's steps take, in the order in which a file's lines are drawn."""
    a_step: int
    """How many each optimiser step takes."""
    coefficient: float
    """Weight of their mean loss; GRPO's loss has weight 1."""
    seed: int
    """Of the order of every pass after the first."""


class MixedGRPOTrainer(RewardedGRPOTrainer):
    """RewardedGRPOTrainer that adds the likelihood of general rows to the loss of training."""

    def __init__(self, *, general: General, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.general = general

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The loss of a micro-batch of rollouts, and in training that of this micro-step's general rows."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + self.general.coefficient * self._nll(model) if self.model.training else loss

    def _nll(self, model: Any) -> Tensor:
        """Of L_nll, what this micro-step is dealt, times the number of processes, over which gradients are averaged."""
        micro_steps, processes = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        rows = mix.of_step(self.general.rows, self.general.a_step, self.state.global_step, self.general.seed)
        part = self._step % micro_steps * processes + self.accelerator.process_index
        mine = rows[part :: micro_steps * processes]
        ids, mask, targets = batch(mine or rows[:1], self._tokenizer.pad_token_id, self.accelerator.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        total = cross_entropy(
            logits.flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=NOTHING, reduction="sum"
        )
        nll = total * bool(mine) / trained(rows)
        # TRL logs the mean over micro-steps
        self._metrics["train"]["mix/loss"].append(
            micro_steps * self.accelerator.reduce(nll.detach(), reduction="sum").item()
        )
        return processes * nll


def trained(rows: Sequence[TokenRow]) -> int:
    """N: their completion tokens. The response prefix is not one of them, as it is none of a rollout's."""
    return sum(row.roles[1:].count(COMPLETION) for row in rows)


def batch(rows: Sequence[TokenRow], padding: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, targets), each (rows, longest), padded on the right; a target is not yet shifted."""
    longest = max(len(row.ids) for row in rows)
    short = [longest - len(row.ids) for row in rows]
    ids = [[*row.ids, *[padding] * n] for row, n in zip(rows, short, strict=True)]
    mask = [[1] * len(row.ids) + [0] * n for row, n in zip(rows, short, strict=True)]
    targets = [
        [*(id if role == COMPLETION else NOTHING for id, role in zip(row.ids, row.roles, strict=True)), *[NOTHING] * n]
        for row, n in zip(rows, short, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device), torch.tensor(targets, device=device)
