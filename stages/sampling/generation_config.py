"""Overrides the model's generation settings for transformers' own generation loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def own_settings(model: PreTrainedModel, config: GenerationConfig | None = None) -> Iterator[None]:
    """Inside, the model's generation settings are `config`, or those that say where a turn ends and nothing else.

    transformers fills every field that a caller leaves unset from the model's own settings, and many models carry a
    repetition penalty or a min_p: what is sampled would not be the policy that is trained.
    """
    theirs = model.generation_config
    ends = {name: getattr(theirs, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    model.generation_config = config or GenerationConfig(**ends)
    try:
        yield
    finally:
        model.generation_config = theirs
