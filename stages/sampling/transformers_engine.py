"""The backend `transformers`: our own decoding loop over a PreTrainedModel.

A batch of sequences -> their completions. A prompt is read once for all its samples. Keys and values are written in
place, and finished sequences leave the batch. The loop ignores the model's generation settings, so temperature is the
only setting of the sampler.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from stages.sampling import Decoding, SequenceRequest
from stages.sampling.draws import Uniforms, draw
from stages.sampling.kv_cache import empty, in_place

LEAVE = 1 / 8
"""Share of a batch that must be finished before it leaves, since a smaller batch copies all keys and values."""


@dataclass(frozen=True)
class Transformers:
    """A loaded model, on its device."""

    model: PreTrainedModel
    ends: frozenset[int]
    pad: int
    batch_tokens: int
    name: str = "transformers"

    @torch.inference_mode()
    def complete(self, batch: Sequence[SequenceRequest], decoding: Decoding) -> list[list[int]]:
        """See `Engine`. Raises BadInput for a model whose cache cannot be split by sequence."""
        self.model.eval()
        completions: list[list[int]] = [[] for _ in batch]
        running = list(range(len(batch)))  # the sequence of each line; a finished one too, until it leaves
        uniforms = Uniforms([request.seed for request in batch])
        state = self._read(batch, decoding.max_completion_length)
        finished = set[int]()
        for step in range(decoding.max_completion_length):
            if decoding.temperature > 0:
                tokens = draw(state.logits.float(), decoding.temperature, uniforms.at(step, running))
            else:
                tokens = state.logits.argmax(-1)
            for i, token in zip(running, tokens.tolist(), strict=True):
                if i not in finished:
                    completions[i].append(token)
                    if token in self.ends:
                        finished.add(i)
            if len(finished) == len(batch) or step + 1 == decoding.max_completion_length:
                break
            left = [line for line, i in enumerate(running) if i not in finished]
            if len(running) - len(left) >= LEAVE * len(running):
                running = [running[line] for line in left]
                tokens = tokens[left]
                state.keep(left)
            self._step(state, tokens)
        return completions

    def _read(self, batch: Sequence[SequenceRequest], longest: int) -> State:
        """The batch after its prompts; each distinct prompt is read once."""
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(request.prompt) for request in batch))}
        ids, mask = _left_padded(list(distinct), self.pad, self.model.device)
        state = State(
            empty(self.model, self.name), torch.cat([mask, mask.new_ones(len(distinct), longest)], 1), ids.size(1)
        )
        self._forward(state, ids, (mask.cumsum(1) - 1).clamp(min=0))
        state.keep([distinct[tuple(request.prompt)] for request in batch])
        in_place(state.cache, longest)
        return state

    def _step(self, state: State, tokens: torch.Tensor) -> None:
        """Read a token of each sequence."""
        positions = state.mask[:, : state.width].sum(1, keepdim=True)
        state.width += 1
        self._forward(state, tokens[:, None], positions)

    def _forward(self, state: State, ids: torch.Tensor, positions: torch.Tensor) -> None:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        supported = {name: value for name, value in optional.items() if name in self._parameters}
        mask = state.mask[:, : state.width]
        output: Any = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=state.cache, use_cache=True, **supported
        )
        state.logits = output.logits[:, -1]

    @cached_property
    def _parameters(self) -> frozenset[str]:
        """Names of the parameters of the model's forward pass, which not all models have in common."""
        return frozenset(inspect.signature(self.model.forward).parameters)


class State:
    """A batch between two tokens."""

    def __init__(self, cache: DynamicCache, mask: torch.Tensor, width: int) -> None:
        self.cache = cache
        self.mask = mask
        """(B, T) with columns for the longest completion; the first `width` columns are filled."""
        self.width = width
        self.logits = torch.empty(0)
        """(B, V) of the next token."""

    def keep(self, lines: list[int]) -> None:
        """Continue with these lines of the batch; a line may occur several times."""
        index = torch.tensor(lines, device=self.mask.device)
        self.mask, self.logits = self.mask[index], self.logits[index]
        self.cache.batch_select_indices(index)


def _left_padded(prompts: list[tuple[int, ...]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and attention mask."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
