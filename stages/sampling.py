"""The sampler: token ids in, token ids out. What is sampled is kept as it is; nobody re-tokenises it.

Prompts are sorted by length and padded on the left; the model's own generation settings are overruled, so that temperature is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages import ranks
from stages.chunks import Chunks, commit, read

SEQUENCES = 512
"""Sequences that are generated side by side."""
SEED_STRIDE = 1_000_003
"""How far apart the batches' seeds of two seeds are."""


@dataclass(frozen=True)
class Decoding:
    """How to decode."""

    temperature: float
    """0 is greedy; there is no top-k and no top-p."""
    max_completion_length: int
    """Tokens, the prefix not counted."""
    samples: int = 1
    """Completions per prompt."""


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
    chunks: Chunks | None = None,
) -> list[list[list[int]]]:
    """`samples` completions of each prompt, in the order of the prompts, each with its turn end where it came to one.

    The same seed, prompts and model give the same completions, however many processes share the work. `on_progress` hears how many prompts are
    done. What was sampled is committed to `chunks`, batch by batch, and not sampled again.
    """
    model.eval()
    config, ends = _generation_config(model, tokenizer, decoding)
    with own_settings(model, config):
        completions = ranks.together(_generate(model, prompts, decoding, config, ends, seed, on_progress, chunks))
    return [completions[i] for i in range(len(prompts))]


@contextmanager
def own_settings(model: PreTrainedModel, config: GenerationConfig | None = None) -> Iterator[None]:
    """Inside, the model's generation settings are `config`, or those that say where a turn ends and nothing else.

    transformers fills every field that a caller leaves unset from the model's own settings, and many models carry a repetition penalty or a min_p: what is
    sampled would not be the policy that is trained.
    """
    theirs = model.generation_config
    ends = {name: getattr(theirs, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    model.generation_config = config or GenerationConfig(**ends)
    try:
        yield
    finally:
        model.generation_config = theirs


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    config: GenerationConfig,
    ends: set[int],
    seed: int,
    on_progress: Callable[[int], None],
    chunks: Chunks | None,
) -> dict[int, list[list[int]]]:
    """Prompt's number -> its completions, of this process's share: every world-th batch, each with a seed of its own."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, SEQUENCES // decoding.samples)
    completions: dict[int, list[list[int]]] = {}
    for start in range(per_batch * ranks.rank(), len(order), per_batch * ranks.world()):
        batch = order[start : start + per_batch]
        sequences = _batch(
            model, [prompts[i] for i in batch], decoding, config, ends, SEED_STRIDE * seed + start, chunks
        )
        for j, i in enumerate(batch):
            completions[i] = sequences[j * decoding.samples : (j + 1) * decoding.samples]
        on_progress(min(len(order), start + per_batch * ranks.world()))
    return completions


def _batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    decoding: Decoding,
    config: GenerationConfig,
    ends: set[int],
    seed: int,
    chunks: Chunks | None,
) -> list[list[int]]:
    """`samples` completions of each prompt, one prompt's after another's."""
    asked = {"prompts": [list(prompt) for prompt in prompts], "seed": seed, "ends": sorted(ends), **asdict(decoding)}
    place = chunks.place(asked) if chunks else None
    if place and (committed := read(place)):
        return committed
    torch.manual_seed(seed)
    ids, mask = _left_padded(prompts, config.pad_token_id, model.device)
    generated = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
    sequences = [_until_end(sequence, ends) for sequence in generated[:, ids.size(1) :].tolist()]
    if place:
        commit(place, sequences)
    return sequences


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> tuple[GenerationConfig, set[int]]:
    ends = turn_ends(model, tokenizer)
    how = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=decoding.max_completion_length,
        num_return_sequences=decoding.samples,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        disable_compile=True,
        **(how if decoding.temperature > 0 else {"do_sample": False}),
    )
    return config, ends


def turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a completion: the tokenizer's eos and all that the model declares."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    declared = declared if isinstance(declared, list) else [declared]
    return {end for end in (cast(int, tokenizer.eos_token_id), *declared) if end is not None}


def _left_padded(prompts: list[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and attention mask."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_end(sequence: list[int], ends: set[int]) -> list[int]:
    """Ids up to and including the first end; all of them when it never came."""
    stop = next((i + 1 for i, id in enumerate(sequence) if id in ends), len(sequence))
    return sequence[:stop]
