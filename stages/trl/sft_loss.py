"""SFTTrainer with a weight for every token, inside TRL's fused LM head: the full logits are never built.

TRL packs, collates and scores; the batch's `labels` hold each token's role (`tokens.labelled`). We turn roles into
weights per micro-batch (`stages.tokens.weights`), let the fused head score every token that has one, and divide by a
number of the whole optimiser step, so the gradient does not depend on micro-batch, packing or process count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from stages.errors import BadInput
from stages.tokens.weights import NOTHING, Normaliser, Weights, is_answered, normaliser, token_weights
from stages.trl.resume import ExactResume

LEAST: dict[Normaliser, float] = {"weight_sum": 1e-8, "nonzero_count": 1.0, "completion_count": 1.0}
"""What a step's loss is divided by at least, where N would be 0. TRL's 1 is wrong for weights, whose sum may be
less."""


class WeightedSFTTrainer(ExactResume, SFTTrainer):
    """SFTTrainer whose loss weighs tokens by role. Raises BadInput for what would change that loss behind our back."""

    # we divide by a number of the whole step; Trainer must not divide by the accumulation again
    loss_is_scaled_for_ga = True

    answered_a_step: float | None = None
    """N of a step without an answered token under completion_count (`tokens.weights.answered_a_step`). None: not
    known."""

    def __init__(self, *args: Any, weights: Weights, normaliser: Normaliser = "weight_sum", **kwargs: Any) -> None:
        self.weights, self.normaliser = weights, normaliser
        super().__init__(*args, **kwargs)
        self._refuse_other_losses()

    def _refuse_other_losses(self) -> None:
        parallel = self.accelerator.parallelism_config
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise BadInput("token weights need loss_type nll, no label smoothing and no compute_loss_func; remove them")
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise BadInput(
                "token weights do not work with context or sequence parallelism; take it out of the accelerate config"
            )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """N of the optimiser step, over accumulation and processes (float64 until it is summed up)."""
        self._forget_repeats(batch_samples)
        parts = [normaliser(batch["labels"], self.weights, self.normaliser) for batch in batch_samples]
        total = torch.stack(parts).sum().to(device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total / self.get_tp_size()

    def _forget_repeats(self, batch_samples: list[dict[str, Tensor]]) -> None:
        """Mask what accelerate put in twice: at the end of an epoch it repeats rows until every process has a whole
        last batch.

        Packed sequences cannot be told apart once they lie end to end; there the repeats stay, as in plain TRL.
        """
        epoch = self.accelerator.gradient_state
        processes, micro = self.accelerator.num_processes, self.args.per_device_train_batch_size
        if processes == 1 or not epoch.end_of_dataloader or epoch.remainder <= 0 or self.args.packing:
            return
        mine = min(max(epoch.remainder - self.accelerator.process_index * micro, 0), micro)
        last = batch_samples[-1]
        if "position_ids" not in last:
            last["labels"][mine:] = NOTHING
            return
        starts = (last["position_ids"][0] == 0).nonzero()  # rows lie end to end
        if len(starts) > mine:
            last["labels"][:, starts[mine] :] = NOTHING

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """- sum(w log p) / N, N over the whole step. (B, T) inputs -> scalar."""
        codes = inputs["labels"]
        weights = token_weights(codes, self.weights)
        scored = {**inputs, "use_cache": False, "labels": inputs["input_ids"].masked_fill(weights == 0, NOTHING)}
        if self.aux_loss_enabled:
            scored["output_router_logits"] = True
        out = model(**scored, fused_lm_head=True)  # log_probs is (B, T-1), 0 where the label is -100
        total = num_items_in_batch
        if total is None:
            total = normaliser(codes, self.weights, self.normaliser)
        weighted = -(weights[:, 1:] * out.log_probs).sum()
        loss = weighted / self._divisor(total)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:  # of a mixture of experts; a mean per micro-batch, as TRL has it
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * out.aux_loss / steps
        self._log_parts(out, is_answered(codes)[:, 1:], inputs)
        return (loss, out) if return_outputs else loss

    def _divisor(self, total: Tensor) -> Tensor:
        """What the weighted sum is divided by, of N as it was counted."""
        if self.normaliser == "completion_count" and self.answered_a_step:
            return torch.where(total > 0, total, self.answered_a_step / self.get_tp_size())
        return total.clamp(min=LEAST[self.normaliser])

    @torch.no_grad()
    def _log_parts(self, out: Any, answered: Tensor, inputs: dict[str, Tensor]) -> None:
        """Unweighted loss of each part, so that runs with different weights can be compared; entropy and accuracy of
        the completion."""
        completion, prompt = answered & out.label_mask, out.label_mask & ~answered
        nll = -out.log_probs
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        else:
            tokens = torch.tensor(inputs["input_ids"].numel())
        sums = [completion.sum(), prompt.sum(), (nll * completion).sum(), (nll * prompt).sum()]
        sums += [(out.entropy * completion).sum(), (out.is_top1 * completion).sum(), tokens.to(nll.device)]
        gathered = self.accelerator.gather_for_metrics(torch.stack([s.double() for s in sums])[None]).sum(0).tolist()
        n_completion, n_prompt, nll_completion, nll_prompt, entropy, top1, n_tokens = gathered
        log = self._metrics["train" if self.model.training else "eval"]
        if n_completion:
            log["completion_loss"].append(nll_completion / n_completion)
            log["entropy"].append(entropy / n_completion)
            log["mean_token_accuracy"].append(top1 / n_completion)
        if n_prompt:
            log["prompt_loss"].append(nll_prompt / n_prompt)
        self._total_train_tokens += int(n_tokens) // self._tp_size
        log["num_tokens"] = [self._total_train_tokens]
