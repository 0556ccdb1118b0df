"""SFTTrainer with a weight for prompt tokens, inside TRL's fused LM head: the full logits are never built.

TRL prepares the data and labels prompt tokens -100; we turn labels into weights per micro-batch (`stages.weighting`), let the fused head
score every token that has one, and divide by the weights of the whole optimiser step, so the gradient does not depend on the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from stages.weighting import real_tokens, token_weights


class WeightedSFTTrainer(SFTTrainer):
    """SFTTrainer whose loss is the weighted mean over prompt and completion tokens."""

    loss_is_scaled_for_ga = (
        True  # we divide by the whole step's weights; Trainer must not divide by the accumulation again
    )

    def __init__(self, *args: Any, prompt_loss_weight: float, completion_loss_weight: float, **kwargs: Any) -> None:
        self.prompt_loss_weight, self.completion_loss_weight = prompt_loss_weight, completion_loss_weight
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError("prompt loss weights need loss_type nll, no label smoothing and no compute_loss_func")

    def _weights(self, batch: dict[str, Tensor]) -> Tensor:
        return token_weights(batch, self.prompt_loss_weight, self.completion_loss_weight)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """The sum of the weights of the optimiser step, over accumulation and processes (float64 inside)."""
        weights = [self._weights(batch)[..., 1:].sum(dtype=torch.float64) for batch in batch_samples]
        total = torch.stack(weights).sum().to(device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """- sum(w log p) / sum(w), the denominator over the whole step. (B, T) inputs -> scalar."""
        weights = self._weights(inputs)
        is_completion = inputs["labels"] != -100
        scored = {**inputs, "use_cache": False, "labels": inputs["input_ids"].masked_fill(weights == 0, -100)}
        out = model(**scored, fused_lm_head=True)  # log_probs is (B, T-1), 0 where the label is -100
        w = weights[:, 1:]
        total = w.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(w * out.log_probs).sum() / total.clamp(min=1e-8)  # TRL clamps at 1, wrong where weights sum to less
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._log_parts(out, is_completion[:, 1:], scored)
        return (loss, out) if return_outputs else loss

    @torch.no_grad()
    def _log_parts(self, out: Any, is_completion: Tensor, inputs: dict[str, Tensor]) -> None:
        """Unweighted loss of each part, so that runs with different weights can be compared; entropy and accuracy of the completion."""
        completion, prompt = is_completion & out.label_mask, out.label_mask & ~is_completion
        nll = -out.log_probs
        sums = [completion.sum(), prompt.sum(), (nll * completion).sum(), (nll * prompt).sum()]
        sums += [(out.entropy * completion).sum(), (out.is_top1 * completion).sum(), real_tokens(inputs).sum()]
        gathered = self.accelerator.gather_for_metrics(torch.stack([s.float() for s in sums])[None]).sum(0).tolist()
        n_completion, n_prompt, nll_completion, nll_prompt, entropy, top1, tokens = gathered
        log = self._metrics["train" if self.model.training else "eval"]
        if n_completion:
            log["completion_loss"].append(nll_completion / n_completion)
            log["entropy"].append(entropy / n_completion)
            log["mean_token_accuracy"].append(top1 / n_completion)
        if n_prompt:
            log["prompt_loss"].append(nll_prompt / n_prompt)
        self._total_train_tokens += int(tokens)
        log["num_tokens"] = [self._total_train_tokens]
