"""Which token a sequence gets: one uniform number a token, from a generator that is the sequence's own.

logits (B, V) + a uniform number each -> ids (B). The token is the first whose cumulative probability is above the
number: the inverse of the distribution function, so token i is drawn with exactly its probability, the length of its
piece of [0, 1). Because the number depends on the sequence alone, another batch can change the token only where
rounding moves a boundary across it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

BLOCK = 64
"""Numbers that are drawn from a generator at a time."""
AT_ONCE = 2**24
"""Cumulative probabilities in memory at a time, 8 bytes each."""


class Uniforms:
    """The numbers of sequences that go step by step together.

    Philox (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) keyed by the sequence's seed; numpy
    guarantees its stream of raw bits.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [np.random.Philox(key=seed) for seed in seeds]
        self._block = np.empty((len(seeds), BLOCK))

    def at(self, step: int, running: Sequence[int]) -> torch.Tensor:
        """(len(running)) float64 in [0, 1), of the sequences in `running`. Steps are asked for in order, and who has
        left does not come back."""
        if step % BLOCK == 0:
            for i in running:
                self._block[i] = (self._generators[i].random_raw(BLOCK) >> 11) * 2.0**-53
        return torch.from_numpy(self._block[running, step % BLOCK])


def draw(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
    """Ids (B) for logits (B, V). Summed in float64: float32 would leave out tokens that are rarer than 1e-7."""
    per_slice = max(1, AT_ONCE // logits.size(-1))
    slices = zip(logits.split(per_slice), uniforms.to(logits.device).split(per_slice), strict=True)
    return torch.cat([_inverse(some / temperature, numbers) for some, numbers in slices])


def _inverse(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = torch.softmax(logits, -1, dtype=torch.float64).cumsum(-1)
    # the sum may miss 1 by rounding, and a piece of length 0 is never hit from the right
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True).squeeze(1)
