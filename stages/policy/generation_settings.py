"""A model's generation settings, which are published with its policy: those that contradict each other cannot be saved,
and a stage would fail after its training."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
"""Settings that say something only where `do_sample` is true."""
ENDS = ("eos_token_id", "pad_token_id", "bos_token_id")


class Saveable(NamedTuple):
    """Settings that can be saved."""

    settings: GenerationConfig
    left_out: tuple[str, ...]
    """Names of those that contradict the others."""


def saveable(theirs: GenerationConfig) -> Saveable:
    """The settings as they are; else without those that greedy decoding does not use; else the ends of a text alone.
    What transformers generates by them is the same."""
    without = deepcopy(theirs)
    left_out = [name for name in SAMPLING if not theirs.do_sample and getattr(theirs, name, None) is not None]
    for name in left_out:
        setattr(without, name, None)
    if _can_be_saved(theirs):
        return Saveable(theirs, ())
    if _can_be_saved(without):
        return Saveable(without, tuple(left_out))
    ends = GenerationConfig(**{name: getattr(theirs, name, None) for name in ENDS})
    return Saveable(ends, tuple(sorted(set(theirs.to_diff_dict()) - {*ENDS, "transformers_version"})))


def _can_be_saved(settings: GenerationConfig) -> bool:
    """Whether transformers would write them after a training has changed their ends."""
    try:
        deepcopy(settings).validate(strict=True)
    except ValueError:
        return False
    return True
