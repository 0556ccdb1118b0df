"""A small model of a policy's architecture with random weights, for questions whose answer does not depend on them.

config -> a copy with one layer of each kind, a vocabulary of 256, narrow MLPs, short windows and
no dropout -> a model. Attention has the policy's own width, heads and implementation, so whatever mixes tokens is the
policy's own code on the job's device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 256
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Ids inside the small vocabulary."""
NARROW = 64
WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
"""Widths of MLPs, which work on each token alone."""
WINDOW = 4
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""Tokens that a layer looks back. A short row does not fill a real window."""
LOGIT = 4.0
"""Standard deviation of a logit."""
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers")
"""What may say of each layer which kind it is."""


def small_copy(config: Any) -> Any:
    """A small config of the same architecture. `config` is a PreTrainedConfig; of a model with several parts, the copy
    is of the one that reads text."""
    small = copy.deepcopy(config.get_text_config())
    kept = _layers(small)
    for name, value in list(vars(small).items()):
        if isinstance(value, (list, tuple)) and "layer" in name and len(value) == small.num_hidden_layers:
            setattr(small, name, type(value)(value[i] for i in kept))
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(small, name, 0.0)
        elif name in WINDOWS and value:
            setattr(small, name, min(value, WINDOW))
    small.num_hidden_layers = len(kept)
    small.vocab_size = VOCABULARY
    for name, id in SPECIAL.items():
        setattr(small, name, id)
    return small


def _layers(config: Any) -> list[int]:
    """One layer of each kind. Where the config works the kinds out from numbers, all layers up to the last of them."""
    found = {0}
    for name in KINDS:
        kinds = [repr(kind) for kind in getattr(config, name, None) or ()][: config.num_hidden_layers]
        found |= {kinds.index(kind) for kind in set(kinds)}
    follow = any(name not in vars(config) and getattr(config, name, None) for name in KINDS)
    return list(range(max(found) + 1)) if follow else sorted(found)


def narrowed(small: Any) -> Any:
    """The copy with narrow MLPs: wide ones are most of a model's memory."""
    narrow = copy.deepcopy(small)
    for name in WIDTHS:
        value = getattr(narrow, name, None)
        if isinstance(value, int) and value > NARROW:
            setattr(narrow, name, NARROW)
    return narrow


def small_model(config: Any, device: torch.device) -> PreTrainedModel:
    """A model of `small_copy(config)`. Its weights are large enough that whatever a token sees shows in the logits.
    Raises whatever the architecture raises that cannot be made so small."""
    small = small_copy(config)
    half = "flash" in (small._attn_implementation or "")
    errors: list[Exception] = []
    for one in (narrowed(small), small):
        try:
            return _filled(_built(one, device, torch.bfloat16 if half else torch.float32))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            errors.append(error)  # a width that another one follows from
    raise errors[-1]


def _built(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model: Any
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    return model


@torch.no_grad()
def _filled(model: PreTrainedModel) -> PreTrainedModel:
    """With weights that keep the size of what they are applied to, and logits so large that a cap on them shows."""
    generator = torch.Generator(model.device).manual_seed(0)
    head = model.get_output_embeddings()
    end = None if head is None else head.weight
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for weight in model.parameters():
        if weight is end:
            weight.normal_(std=LOGIT * weight.shape[-1] ** -0.5, generator=generator)
        elif weight.dim() > 1:
            size = 1.0 if id(weight) in embeddings else (weight.shape[-2] * weight.shape[-1]) ** -0.25
            weight.normal_(std=size, generator=generator)
    return model
