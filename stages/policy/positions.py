"""Where a row's position in a batch changes what a model makes of it.

the config.json of a policy -> whether it needs the own positions of rows that are padded on the left, as TRL's GRPO
scores them, and up to which length a row's positions are its own affair. Most models need nothing: their positions are
relative, or they count the mask themselves. A model with learned positions would count the padding. Cheap to import:
the plan reads it, because these positions are part of a grpo stage's key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo"})
"""Model types that look up a vector for each position, and take positions from their caller."""


def needed(config: Mapping[str, Any]) -> bool:
    """Whether a model scores a row that is padded on the left as it scores the row alone only with the row's own
    positions. `config` is the content of a config.json."""
    text = config.get("text_config") or config
    return text.get("model_type") in LEARNED


def longest_exact(config: Any) -> int | None:
    """Tokens up to which a row's rotary positions do not depend on the longest row of its batch. `config` is a
    PreTrainedConfig. None: no limit."""
    text = config.get_text_config()
    limits = [_limit(text, rotary) for rotary in _rotary(getattr(text, "rope_parameters", None) or {})]
    return min((limit for limit in limits if limit is not None), default=None)


def _rotary(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of all layers, or of each kind of layer."""
    yield parameters
    yield from (part for part in parameters.values() if isinstance(part, Mapping))


def _limit(config: Any, rotary: Mapping[str, Any]) -> int | None:
    if rotary.get("rope_type") == "dynamic":
        return config.max_position_embeddings
    if rotary.get("rope_type") == "longrope":
        return rotary.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return None
