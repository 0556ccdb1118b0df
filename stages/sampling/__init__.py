"""The sampler: token ids in, token ids out. Sampled ids are kept, and never tokenised again.

prompts and their keys -> `samples` completions each. With the backend `transformers`, a completion follows from (seed,
key, sample number) alone. Its batch, its process and the other prompts do not matter (`stages.sampling.draws`). A
backend is an Engine: a loaded policy that completes batches. This module cuts the work into batches, shares them among
processes and commits what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
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


class SequenceRequest(NamedTuple):
    """One sequence to sample."""

    row: int
    """Index of its prompt."""
    sample: int
    prompt: Sequence[int]
    seed: int
    """0 <= seed < 2**128; each sequence has its own."""
    name: str
    """Digest that identifies it among the sequences of one policy and decoding."""


class Engine(Protocol):
    """A loaded policy that completes prompts; every backend is one."""

    @property
    def name(self) -> str:
        """The backend's name in a recipe."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a completion."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Size of a batch in tokens: sequences x (prompt + longest completion)."""
        ...

    def complete(self, batch: Sequence[SequenceRequest], decoding: Decoding) -> list[list[int]]:
        """A completion of each, with its end token unless it was cut off."""
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
    """`samples` completions of each prompt, in the order of the prompts, each with its end token unless it was cut off.

    `keys` name the prompts: equal prompts under equal keys get equal completions. `on_progress` gets the number of
    finished prompts. Completions are committed to `chunks` batch by batch. A committed one is not sampled again, even
    if the next call forms other batches.
    """
    requests = list(_requests(prompts, keys, decoding.samples, seed))
    done = ranks.together(_sampled(engine, requests, decoding, on_progress, chunks))
    return [[done[i * decoding.samples + k] for k in range(decoding.samples)] for i in range(len(prompts))]


def _requests(
    prompts: Sequence[Sequence[int]], keys: Sequence[str], samples: int, seed: int
) -> Iterator[SequenceRequest]:
    """All sequences, prompt by prompt."""
    for row, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        for number in range(samples):
            digest = _digest([seed, key, number])
            yield SequenceRequest(row, number, prompt, int(digest[:32], 16), _digest([digest, list(prompt)])[:32])


def batches(requests: Iterable[SequenceRequest], longest: int, tokens: int) -> list[list[SequenceRequest]]:
    """Batches of sequences, longest prompts first, so that the batch that needs most memory runs first. A batch holds
    one sequence, or at most `tokens` tokens: padded prompts, and completions of `longest` tokens."""
    cut: list[list[SequenceRequest]] = []
    for request in sorted(requests, key=lambda request: (-len(request.prompt), request.row, request.sample)):
        if not cut or (len(cut[-1]) + 1) * (len(cut[-1][0].prompt) + longest) > tokens:
            cut.append([])
        cut[-1].append(request)
    return cut


def _sampled(
    engine: Engine,
    requests: Sequence[SequenceRequest],
    decoding: Decoding,
    on_progress: Callable[[int], None],
    chunks: Chunks | None,
) -> dict[int, list[int]]:
    """Index of a sequence -> its completion, for this process's share: every world-th batch."""
    shelf = chunks.shelf(_question(engine, decoding)) if chunks else None
    committed = shelf.read() if shelf else {}
    done: dict[int, list[int]] = {}
    for batch in batches(requests, decoding.max_completion_length, engine.batch_tokens)[ranks.rank() :: ranks.world()]:
        missing = [request for request in batch if request.name not in committed]
        if missing:
            completions = engine.complete(missing, decoding)
            fresh = {request.name: ids for request, ids in zip(missing, completions, strict=True)}
            committed |= fresh
            if shelf:
                shelf.commit(fresh)
        done |= {request.row * decoding.samples + request.sample: committed[request.name] for request in batch}
        on_progress(min(len(requests), len(done) * ranks.world()) // decoding.samples)
    return done


def _question(engine: Engine, decoding: Decoding) -> list[Any]:
    """The settings that all sequences share; a committed completion counts only under equal ones."""
    return [engine.name, decoding.temperature, decoding.max_completion_length, sorted(engine.ends)]


def until_end(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Ids up to and including the first end; all of them when there is none."""
    for i, token in enumerate(ids):
        if token in ends:
            return list(ids[: i + 1])
    return list(ids)


def turn_ends(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's eos and those of the model's generation settings."""
    ends = [tokenizer.eos_token_id]
    declared = generation_config.eos_token_id if generation_config else None
    if isinstance(declared, list):
        ends += declared
    else:
        ends.append(declared)
    return frozenset(end for end in ends if end is not None)


def _digest(value: Any) -> str:
    return sha256(dumps(value).encode()).hexdigest()
