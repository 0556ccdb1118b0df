"""GRPOTrainer that scores rows with their own positions, for models that would count the padding
(`stages.policy.positions`).

TRL pads prompts on the left and gives the model a mask and no positions. One hook:
`_get_per_token_logps_and_entropies`, which scores rollouts for the policy and for its KL reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer


class PositionedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with `own_positions`."""

    own_positions = False
    """Give the model the position of each token in its row. False: as TRL."""

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        scored = positioned(model) if self.own_positions else model
        return super()._get_per_token_logps_and_entropies(scored, *args, **kwargs)


def positioned(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model's call with positions that count the tokens of the mask, padding being 0, as generation counts them."""

    def call(*, attention_mask: Tensor, **inputs: Any) -> Any:
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        return model(attention_mask=attention_mask, position_ids=positions, **inputs)

    return call
