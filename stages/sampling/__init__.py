"""The sampler: token ids in, token ids out. What is sampled is kept as it is; nobody re-tokenises it.

prompts and their keys -> `samples` completions each. With the backend `transformers`, what a sequence gets follows from
(seed, key, sample number) alone: not from its batch, from the process that samples it, from the order of the prompts or
from which others there are (`stages.sampling.draws`). A backend is an Engine: a policy that is loaded, and completes
what it is given. This module cuts the work into batches, shares them among processes and keeps what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from json import dumps
from typing import Any, NamedTuple, Protocol

from stages.runtime import ranks
from stages.runtime.chunks import Chunks


@dataclass(frozen=True)
class Decoding:
    """How to decode."""

    temperature: float
    """0 is greedy; there is no top-k and no top-p."""
    max_completion_length: int
    """Tokens, the prefix not counted."""
    samples: int = 1
    """Completions per prompt."""


class Asked(NamedTuple):
    """One sequence that is to be sampled."""

    row: int
    """Place of its prompt."""
    sample: int
    prompt: Sequence[int]
    seed: int
    """0 <= seed < 2**128; its own."""
    name: str
    """Digest of everything that tells it from others of the same policy and decoding."""


class Engine(Protocol):
    """A policy that is loaded and completes prompts: what a backend is."""

    @property
    def name(self) -> str:
        """What the recipe calls the backend."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a completion."""
        ...

    @property
    def batch_tokens(self) -> int:
        """What it is given at a time: sequences x (prompt + longest completion)."""
        ...

    def complete(self, batch: Sequence[Asked], decoding: Decoding) -> list[list[int]]:
        """A completion of each, with its end where it came to one."""
        ...


def sample(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
    chunks: Chunks | None = None,
) -> list[list[list[int]]]:
    """`samples` completions of each prompt, in the order of the prompts, each with its turn end where it came to one.

    `keys` name the prompts; equal prompts under equal keys get equal completions. `on_progress` hears how many prompts'
    worth of sequences is done. What was sampled is committed to `chunks`, batch by batch, and is not sampled again, in
    whatever batches it is asked for.
    """
    asked = list(_asked(prompts, keys, decoding.samples, seed))
    done = ranks.together(_sampled(engine, asked, decoding, on_progress, chunks))
    return [[done[i * decoding.samples + k] for k in range(decoding.samples)] for i in range(len(prompts))]


def _asked(prompts: Sequence[Sequence[int]], keys: Sequence[str], samples: int, seed: int) -> Iterator[Asked]:
    """Every sequence, a prompt's after another's."""
    for row, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        for number in range(samples):
            own = _digest([seed, key, number])
            yield Asked(row, number, prompt, int(own[:32], 16), _digest([own, list(prompt)])[:32])


def batches(asked: Iterable[Asked], longest: int, tokens: int) -> list[list[Asked]]:
    """Sequences side by side, those with the longest prompts first, so that what does not fit into memory shows at
    once. A batch holds at most `tokens` tokens, padding and completions of `longest` counted, or one sequence."""
    cut: list[list[Asked]] = []
    for one in sorted(asked, key=lambda one: (-len(one.prompt), one.row, one.sample)):
        if not cut or (len(cut[-1]) + 1) * (len(cut[-1][0].prompt) + longest) > tokens:
            cut.append([])
        cut[-1].append(one)
    return cut


def _sampled(
    engine: Engine,
    asked: Sequence[Asked],
    decoding: Decoding,
    on_progress: Callable[[int], None],
    chunks: Chunks | None,
) -> dict[int, list[int]]:
    """Sequence's place -> its completion, of this process's share: every world-th batch, less what is committed."""
    shelf = chunks.shelf(_question(engine, decoding)) if chunks else None
    committed = shelf.read() if shelf else {}
    done: dict[int, list[int]] = {}
    for batch in batches(asked, decoding.max_completion_length, engine.batch_tokens)[ranks.rank() :: ranks.world()]:
        if left := [one for one in batch if one.name not in committed]:
            fresh = dict(zip((one.name for one in left), engine.complete(left, decoding), strict=True))
            committed |= fresh
            if shelf:
                shelf.commit(fresh)
        done |= {one.row * decoding.samples + one.sample: committed[one.name] for one in batch}
        on_progress(min(len(asked), len(done) * ranks.world()) // decoding.samples)
    return done


def _question(engine: Engine, decoding: Decoding) -> list[Any]:
    """What all sequences have in common, and what must be equal for one that is committed to be the one that is asked
    for."""
    return [engine.name, decoding.temperature, decoding.max_completion_length, sorted(engine.ends)]


def until_end(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Ids up to and including the first end; all of them when it never came."""
    stop = next((i + 1 for i, id in enumerate(ids) if id in ends), len(ids))
    return list(ids[:stop])


def turn_ends(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's eos and all that the model's generation settings declare."""
    declared = generation_config.eos_token_id if generation_config else None
    every = chain([tokenizer.eos_token_id], declared if isinstance(declared, list) else [declared])
    return frozenset(end for end in every if end is not None)


def _digest(value: Any) -> str:
    return sha256(dumps(value).encode()).hexdigest()
