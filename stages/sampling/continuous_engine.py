"""The backend `continuous`: transformers' own continuous batching, `generate_batch`.

Sequences join and leave a paged cache as they come and end. It draws from one stream of random numbers for all of them:
a batch is seeded as a whole, by the sequences in it, so the same batches give the same completions on the same kind of
machine, and other batches others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from stages.sampling import Decoding, SequenceRequest, until_end
from stages.sampling.generation_config import own_settings
from stages.sampling.kv_cache import empty

PAGE = 256
"""Tokens of a page of the cache, transformers' default."""
FORWARD = 512
"""Tokens of one forward pass on a CPU; on a GPU transformers finds it."""
QUEUE = 8
"""How many times the sequences that fit into the cache are queued at a time; it refills itself from the queue."""


@dataclass(frozen=True)
class Continuous:
    """A loaded model, on its device."""

    model: PreTrainedModel
    ends: frozenset[int]
    pad: int
    cache_tokens: int
    """Tokens that the cache holds on a CPU; on a GPU transformers takes what is free."""
    name: str = "continuous"

    @property
    def batch_tokens(self) -> int:
        """See `Engine`."""
        return QUEUE * self.cache_tokens

    def complete(self, batch: Sequence[SequenceRequest], decoding: Decoding) -> list[list[int]]:
        """See `Engine`. Raises BadInput for a model with recurrent layers, and RuntimeError when a sequence is left
        unanswered, which transformers only logs."""
        empty(self.model.eval(), self.name)
        sampling: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=decoding.max_completion_length,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.pad,
            **sampling,
        )
        torch.manual_seed(_seed(batch))
        with own_settings(self.model, config):
            outputs = cast(Any, self.model).generate_batch(
                [list(request.prompt) for request in batch],
                generation_config=config,
                continuous_batching_config=self._batching(batch, decoding.max_completion_length),
            )
        if len(outputs) != len(batch) or any(output.error for output in outputs.values()):
            errors = {str(output.error) for output in outputs.values() if output.error}
            raise RuntimeError(
                f"continuous batching answered {len(outputs)} of {len(batch)} sequences; "
                f"{'; '.join(errors) or 'its log says why'}"
            )
        return [until_end(output.generated_tokens, self.ends) for output in outputs.values()]

    def _batching(self, batch: Sequence[SequenceRequest], longest: int) -> ContinuousBatchingConfig:
        """Sizes of the cache, which transformers measures on a GPU but not on a CPU."""
        if self.model.device.type != "cpu":
            return ContinuousBatchingConfig()
        needed = max(len(request.prompt) for request in batch) + longest
        blocks = max(self.cache_tokens, needed + PAGE) // PAGE
        return ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=FORWARD)


def _seed(batch: Sequence[SequenceRequest]) -> int:
    """0 <= seed < 2**63, from the seeds of all sequences."""
    every = ",".join(str(request.seed) for request in batch)
    return int(sha256(every.encode()).hexdigest()[:15], 16)
