"""Selection: which rollouts of a row become data."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from stages.problems.base import Judgement
from stages.problems.scheduling import Scheduling
from stages.rejection import Keep, select
from stages.rollouts import Rollout

PROBLEM = Scheduling("compact")


def rollouts(*scores: float, ids: list[int] | None = None) -> list[Rollout]:
    """One rollout a score, with ids of its own unless they are given."""
    numbers = ids or list(range(len(scores)))
    return [
        Rollout(([1], "u"), ([number], "c"), str(number), Judgement(score, "valid", score == 1, True), finished=True)
        for score, number in zip(scores, numbers, strict=True)
    ]


@pytest.mark.parametrize(
    ("keep", "scores", "ids", "kept"),
    [
        (Keep(min_score=0.5, per_prompt=8), (0.4, 0.5, 1.0, 0.6), None, [1, 2, 3]),
        (Keep(min_score=0.5, per_prompt=2), (0.6, 0.5, 1.0, 0.6), None, [0, 2]),
        (Keep(min_score=0.5, per_prompt=8), (1.0, 1.0, 1.0, 0.7), [5, 6, 5, 7], [0, 1, 3]),
        (Keep(min_score=0.0, per_prompt=8), (0.0, 0.0), None, [0, 1]),
        (Keep(min_score=1.0), (0.99, 0.98), None, []),
        (Keep(min_score=0.5, pass_rate=(0.3, 0.7)), (1.0, 1.0, 1.0, 1.0), None, []),
        (Keep(min_score=0.5, pass_rate=(0.3, 0.7)), (1.0, 0.0, 0.0, 0.0), None, []),
        (Keep(min_score=0.5, pass_rate=(0.25, 0.25)), (1.0, 0.0, 0.0, 0.0), None, [0]),
    ],
)
def test_by_score_once_each_best_first_up_to_the_cap_within_the_band(keep, scores, ids, kept):
    assert select(rollouts(*scores, ids=ids), keep, PROBLEM) == kept


def test_a_completion_that_was_cut_is_never_kept():
    """It would teach not to stop."""
    whole, cut = rollouts(1.0, 1.0)
    assert select([replace(cut, finished=False), whole], Keep(), PROBLEM) == [1]


def test_no_other_choice_of_distinct_rollouts_has_a_higher_total_score():
    rng = random.Random(0)
    for _ in range(300):
        scores = [rng.choice([0.0, 0.3, 0.6, 1.0]) for _ in range(6)]
        ids = [rng.randint(0, 3) for _ in scores]
        by_id = {number: rng.choice([0.0, 0.3, 0.6, 1.0]) for number in range(4)}  # equal ids score the same
        group = rollouts(*[by_id[number] for number in ids], ids=ids)
        keep = Keep(min_score=0.3, per_prompt=rng.randint(1, 3))
        kept = select(group, keep, PROBLEM)
        good = [i for i, rollout in enumerate(group) if rollout.judgement.score >= 0.3]
        choices = (
            c for n in range(keep.per_prompt + 1) for c in combinations(good, n) if len({ids[i] for i in c}) == len(c)
        )
        best = max(sum(group[i].judgement.score for i in choice) for choice in choices)
        assert sum(group[i].judgement.score for i in kept) == pytest.approx(best)
        assert len({ids[i] for i in kept}) == len(kept) <= keep.per_prompt
