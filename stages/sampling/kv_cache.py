"""Keys and values that are written in place. transformers' own layer copies everything it holds for each token.

A full-attention layer of a DynamicCache after its prompt -> one with room for the completion. Layers with a sliding
window stay as they are.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stages.errors import BadInput

ROOM = 64
"""Tokens that room is made for at a time."""


class InPlaceLayer(DynamicLayer):
    """`keys` and `values` are views of the first tokens of something longer."""

    def __init__(self, layer: DynamicLayer, longest: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None, "the layer has read its prompt"
        self.lazy_initialization(layer.keys, layer.values)
        self._most = layer.keys.size(-2) + longest
        self._hold(layer.keys, layer.values)

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values so far, views of what has room for more."""
        return self._long_keys[:, :, : self._length], self._long_values[:, :, : self._length]

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy these into something with room for more."""
        self._length = keys.size(-2)
        room = min(ROOM, self._most - self._length)
        self._long_keys, self._long_values = _longer(keys, room), _longer(values, room)
        self.keys, self.values = self._held()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As DynamicLayer's, for one token."""
        if self._length == self._long_keys.size(-2):
            self._hold(*self._held())
        self._length += 1
        keys, values = self._held()
        keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As DynamicLayer's."""
        keys, values = self._held()
        self._hold(keys[indices], values[indices])


def empty(model: PreTrainedModel, sampler: str) -> DynamicCache:
    """A cache as the model's layers want it, full or with a sliding window. Raises BadInput for layers whose state is
    not keys and values of tokens."""
    cache = DynamicCache(config=model.config)
    if not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        raise BadInput(
            f"sampler: {sampler} cannot take the state of {model.config.model_type} apart by sequence: it has "
            f"recurrent layers; set sampler to vllm, or use a model that has attention only"
        )
    return cache


def in_place(cache: DynamicCache, longest: int) -> None:
    """Make room for `longest` tokens, as they come, in every layer that is a plain one."""
    cache.layers = [InPlaceLayer(layer, longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def _longer(held: torch.Tensor, room: int) -> torch.Tensor:
    """(B, H, T, D) -> (B, H, T + room, D)"""
    return torch.cat([held, held.new_empty(*held.shape[:2], room, held.size(-1))], 2)
