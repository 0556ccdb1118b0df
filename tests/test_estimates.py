"""Intervals and pass@k against what they stand for."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from stages.estimates import bootstrap_interval, pass_at_k


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_pass(k):
    passed = (np.random.default_rng(0).random((12, 8)) < 0.2).astype(float)
    by_hand = [np.mean([any(row[list(subset)]) for subset in combinations(range(8), k)]) for row in passed]
    assert pass_at_k(passed, k) == pytest.approx(np.mean(by_hand))


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.beta(0.5, 0.5, size=100), resamples=400)
        hits += low <= 0.5 <= high
    assert 0.91 < hits / 400 < 0.98


def test_the_interval_is_as_wide_as_the_normal_one():
    scores = np.random.default_rng(2).random(1000)
    low, high = bootstrap_interval(scores)
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 1000**0.5, rel=0.1)
    assert bootstrap_interval(scores) == (low, high)
