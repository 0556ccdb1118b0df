"""Selection: which rollouts of a row become data, and which rule dropped each of the others.

the rollouts of one row -> a choice for each, in the same order. Pure. The rules stand in one order (`RULES`), each
sees what the one before it left, and each is counted (`funnel`), so that the counts add up. The best of a row come
first everywhere: by score, then by reward, then those of the newest policy, then those sampled first. There is no rule
that adds anything: a reference answer is never mixed in."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import model_validator

from stages.config import Config, FromList, identity
from stages.data.rollout_line import RolloutLine
from stages.problems.base import Row, total
from stages.problems.custom.settings import by_component

NGRAM = 4
"""Tokens of the pieces that two completions are compared by."""
SAMPLED, KEPT = "sampled", "kept"
"""The ends of a funnel."""


class Keep(Config):
    """Which rollouts are kept. One that could not be judged, or was cut before its turn end, never is."""

    pass_rate: Annotated[tuple[float, float], FromList] | None = identity(None)
    """Only rows of which this share of the judged rollouts passed, both ends included: not hopeless, not yet easy.
    Off: any row."""
    min_score: float = identity(0.99, ge=0, le=1)
    """The least score, 0..1."""
    min_reward: float | None = identity(None)
    """The least reward, the sum of the components by the problem's weights. Off: any."""
    max_length: int | None = identity(None, ge=1)
    """The most tokens of a completion, the prefix not counted, the turn end counted. Off: any that came to its end."""
    dedup: Literal["exact", "normalised", "off"] = identity("exact")
    """What counts as the same completion of a row, of which one is kept: `exact`, the same token ids; `normalised`,
    the same text but for case, white space and Unicode compatibility forms (NFKC). Off: nothing does."""
    max_similarity: float | None = identity(None, ge=0, lt=1)
    """No completion whose token 4-grams overlap with those of a better one of its row by more than this (Jaccard,
    0..1). Off: any."""
    per_prompt: int = identity(2, ge=1)
    """How many of one row at most, the best first; 1 is best-of-n. ReST-EM caps it so that easy rows do not outweigh
    hard ones (arXiv 2312.06585 section 3)."""

    @model_validator(mode="after")
    def _band_is_a_band(self) -> Keep:
        if self.pass_rate and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate: found {list(self.pass_rate)}, expected two shares such as [0.05, 0.9]")
        return self


@dataclass(frozen=True)
class Candidate:
    """What rules look at of a rollout."""

    ids: tuple[int, ...]
    """Of the completion, prefix included."""
    length: int
    """Tokens, the prefix not counted."""
    text: str
    finished: bool
    judged: bool
    score: float
    """0 where there is none."""
    reward: float
    """Minus infinity where no component applies."""
    passed: bool
    sample: int
    """Its number among those that its policy sampled for the row."""
    step: int | None = None
    """The optimiser step it was sampled for; None for a policy that stood still, which is the newest."""
    scored: bool = True
    """It has a score."""


def candidate(line: RolloutLine, weights: Mapping[str, float], passed: Callable[[float], bool]) -> Candidate:
    """From a line of `rollouts.jsonl`."""
    reward = total(by_component(line["rewards"], weights), weights)
    return Candidate(
        ids=tuple(line["ids"]),
        length=len(line["ids"]) - line["prefix"],
        text=line["text"],
        finished=line["finished"],
        judged=line["failure"] is None,
        score=line["score"] or 0.0,
        reward=float("-inf") if reward is None else reward,
        passed=line["failure"] is None and line["score"] is not None and passed(line["score"]),
        sample=line["sample"],
        step=line["step"],
        scored=line["score"] is not None,
    )


class Choice(NamedTuple):
    """What became of a rollout."""

    dropped_by: str | None
    """The first rule that it did not meet; None for one that is kept."""
    rank: int | None
    """1 is the best that is kept of its row; None for one that is not."""


@dataclass(frozen=True)
class Pool:
    """The rollouts of a row, and what became of each."""

    row: Row
    lines: list[RolloutLine]
    candidates: list[Candidate]
    choices: list[Choice]


def select(group: Sequence[Candidate], keep: Keep) -> list[Choice]:
    """A choice for each rollout of a row."""
    left = sorted(range(len(group)), key=lambda i: _best_first(group[i]))
    dropped: dict[int, str] = {}
    for name, rule in RULES.items():
        stays = list(rule([group[i] for i in left], keep))
        dropped |= {i: name for i, stay in zip(left, stays, strict=True) if not stay}
        left = [i for i, stay in zip(left, stays, strict=True) if stay]
    ranks = {i: rank for rank, i in enumerate(left, start=1)}
    return [Choice(dropped.get(i), ranks.get(i)) for i in range(len(group))]


def control(group: Sequence[Candidate], count: int, rng: random.Random) -> list[int]:
    """`count` of a row's rollouts, drawn without replacement whatever they scored, as indices in order. What cannot be
    trained on is left out here as well: a completion that was cut, and one that could not be judged."""
    usable = [i for i, one in enumerate(group) if one.judged and one.finished]
    return sorted(rng.sample(usable, count))


def funnel(choices: Iterable[Choice]) -> dict[str, int]:
    """Rule -> how many are left after it, from `sampled` to `kept`."""
    counts = Counter(choice.dropped_by for choice in choices)
    left = {SAMPLED: counts.total()}
    for name in RULES:
        left[name] = left[[*left][-1]] - counts[name]
    return {**left, KEPT: counts[None]}


def _best_first(one: Candidate) -> tuple[float, ...]:
    age = float("-inf") if one.step is None else -one.step
    return (-one.score, -one.reward, age, one.sample)


def _within_band(group: Sequence[Candidate], keep: Keep) -> list[bool]:
    if keep.pass_rate is None or not group:
        return [True] * len(group)
    low, high = keep.pass_rate
    return [low <= sum(one.passed for one in group) / len(group) <= high] * len(group)


def _firsts(group: Sequence[Candidate], keep: Keep) -> list[bool]:
    """The best of those that say the same."""
    if keep.dedup == "off":
        return [True] * len(group)
    said = [one.ids if keep.dedup == "exact" else normalised(one.text) for one in group]
    first = {words: i for i, words in reversed(list(enumerate(said)))}
    return [first[words] == i for i, words in enumerate(said)]


def normalised(text: str) -> str:
    """NFKC, case folded, every run of white space one blank, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _different(group: Sequence[Candidate], keep: Keep) -> Iterator[bool]:
    """Unlike all better ones that stay."""
    staying: list[frozenset[tuple[int, ...]]] = []
    for one in group:
        pieces = ngrams(one.ids)
        stays = keep.max_similarity is None or all(similarity(pieces, o) <= keep.max_similarity for o in staying)
        if stays:
            staying.append(pieces)
        yield stays


def ngrams(ids: Sequence[int]) -> frozenset[tuple[int, ...]]:
    """The token 4-grams of a completion; a shorter one is a single piece."""
    return frozenset(tuple(ids[i : i + NGRAM]) for i in range(max(1, len(ids) - NGRAM + 1)))


def similarity(a: frozenset[Any], b: frozenset[Any]) -> float:
    """Jaccard: what they share of all that they have, 0..1."""
    return len(a & b) / len(a | b)


Rule = Callable[[Sequence[Candidate], Keep], Iterable[bool]]
RULES: dict[str, Rule] = {
    "judged": lambda group, keep: [one.judged for one in group],
    "pass_rate": _within_band,
    "finished": lambda group, keep: [one.finished for one in group],
    "min_score": lambda group, keep: [one.score >= keep.min_score for one in group],
    "min_reward": lambda group, keep: [keep.min_reward is None or one.reward >= keep.min_reward for one in group],
    "max_length": lambda group, keep: [keep.max_length is None or one.length <= keep.max_length for one in group],
    "dedup": _firsts,
    "max_similarity": _different,
    "per_prompt": lambda group, keep: [i < keep.per_prompt for i in range(len(group))],
}
"""Name of the setting, or of what is always asked -> which of a row's rollouts, the best first, stay."""
