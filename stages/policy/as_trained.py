"""Checks that a published policy is the one that was trained: its tied weights, its precision, and its answers where it
was trained in 4 bits.

a gathered state, a written directory, two models -> a state to write, nothing, nats a token

The invariant: what a key promises is on the disk, or an exception or a number says that it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stages.job import Dtype

IN_FILES: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Our name of a precision -> that of a safetensors header."""
SAMPLE, LONGEST = 4, 256
"""Rows whose answers are compared, and tokens of each: a policy that is published is on the CPU."""


def without_copies(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state that was gathered from several processes, without the second copy of tied weights: gathered tensors share
    no storage, so that nothing else would notice. Raises RuntimeError where the copies differ."""
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if {name, source} <= state.keys()}
    for name, source in tied.items():
        if not torch.equal(state[name], state[source]):
            raise RuntimeError(f"{name} and {source} are tied and were trained apart, so neither can be published")
    return {name: tensor for name, tensor in state.items() if name not in tied}


def refuse_other_precision(directory: Path, model: Any, dtype: Dtype) -> None:
    """Raise RuntimeError where a floating-point tensor of a written policy has another precision than `dtype`, but for
    those that its class keeps in float32."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                found = weights.get_slice(name).get_dtype()
                other = found in IN_FILES.values() and found != IN_FILES[dtype]
                if other and not any(part in name for part in kept):
                    raise RuntimeError(f"{name} would be published in {found} (found {found}, expected {dtype})")


@torch.no_grad()
def divergence(trained: Any, published: Any, rows: Sequence[Sequence[int]]) -> float:
    """KL(trained || published) in nats, the mean over the tokens of rows of ids. Rows are cut at LONGEST tokens, and
    SAMPLE of them are compared."""
    total, tokens = 0.0, 0
    for ids in [row[:LONGEST] for row in rows[:SAMPLE]]:
        ours, theirs = (_log_probs(model, ids) for model in (trained, published))
        total += float((ours.exp() * (ours - theirs)).sum())
        tokens += len(ids)
    return total / tokens


def _log_probs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary) in float32, on the CPU, without dropout."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    model.train(was_training)
    return logits.float().cpu().log_softmax(-1)
