"""Intervals and pass@k against what they stand for."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from pipeline.results.evaluations import bootstrap
from stages.estimates import bootstrap_interval, grouped_interval, pass_at_k
from stages.intervals import wilson_interval


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


def test_the_interval_of_grouped_values_is_that_of_the_groups():
    scores = np.random.default_rng(3).random(300)
    alone = grouped_interval(list(scores), range(300))
    assert alone == pytest.approx(bootstrap_interval(scores))
    thrice = grouped_interval(list(np.repeat(scores, 3)), list(np.repeat(range(300), 3)))
    assert thrice == pytest.approx(alone), "saying a thing three times makes it no surer"
    uneven = grouped_interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"])
    assert uneven == pytest.approx((0.0, 1.0)), "a group of three weighs three"


def test_wilsons_interval_is_the_published_one_and_never_leaves_0_to_1():
    """9, 48, 63 and 67 valid schedules of 100; 0 and all of 10 by hand: z^2 / (n + z^2)."""
    found = [wilson_interval(n, 100) for n in (9, 48, 63, 67)]
    assert found == [
        pytest.approx(pair, abs=6e-4) for pair in ((0.048, 0.162), (0.385, 0.577), (0.532, 0.718), (0.573, 0.754))
    ]
    edge = 1.959964**2 / (10 + 1.959964**2)
    assert wilson_interval(0, 10) == pytest.approx((0, edge)) and wilson_interval(10, 10) == pytest.approx(
        (1 - edge, 1)
    )


def test_wilsons_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(4)
    for share in (0.02, 0.3, 0.5):
        hits = [
            low <= share <= high for low, high in (wilson_interval(int(n), 100) for n in rng.binomial(100, share, 2000))
        ]
        assert 0.92 < np.mean(hits) < 0.99


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_rows_that_are_all_alike_have_wilsons_interval_and_never_an_empty_one(score):
    """With a trial a row, whatever the number of samples. Groups of several sizes too, and means that rounding tells
    apart."""
    for rows in (2, 40, 1000):
        wanted = wilson_interval(score * rows, rows)
        assert bootstrap_interval(np.full(rows, score)) == wanted and wanted[1] > wanted[0]
        sizes = np.arange(rows) % 3 + 1
        values = np.full(sizes.sum(), score)
        assert grouped_interval(list(values), list(np.repeat(np.arange(rows), sizes))) == wanted
    third = np.array([(0.1 + 0.2) / 3, 0.3 / 3] * 20)
    assert np.diff(bootstrap_interval(third))[0] > 0.1


@pytest.mark.parametrize("share", [0.0005, 0.002, 0.998])
def test_intervals_of_rows_that_are_mostly_alike_cover_the_truth(share):
    """Simulated: 200 rows of 0 or 1, of which often all are equal. An empty interval would then miss."""
    rng = np.random.default_rng(5)
    drawn = [(rng.random(200) < share).astype(float) for _ in range(400)]
    alike = np.mean([np.ptp(rows) == 0 for rows in drawn])
    hits = [low <= share <= high for low, high in (bootstrap_interval(rows, resamples=200) for rows in drawn)]
    assert 0.6 < alike < 1 and np.mean(hits) > 0.93


def test_intervals_of_differences_that_are_mostly_zero_cover_the_truth():
    """Simulated: two policies that answer one row in 100 differently, half of them each way or all one way."""
    rng = np.random.default_rng(6)
    for better in (0.5, 1.0):
        truth = (2 * better - 1) / 100
        hits, alike = [], 0
        for _ in range(80):
            differs, sign = rng.random(60) < 1 / 100, np.where(rng.random(60) < better, 1.0, -1.0)
            low, high = bootstrap(list(differs * sign))
            hits.append(low <= truth <= high)
            alike += not differs.any()
        assert alike > 30 and np.mean(hits) > 0.93


def test_a_difference_that_every_row_has_is_bounded_by_the_rows_that_were_not_seen():
    """By hand: of 10 rows none differed, so up to z^2 / (10 + z^2) of all might, each by -1 - d to 1 - d."""
    edge = 1.959964**2 / (10 + 1.959964**2)
    for difference in (-1.0, -0.25, 0.0, 1.0):
        low, high = bootstrap([difference] * 10)
        assert (low, high) == pytest.approx(((1 - edge) * difference - edge, (1 - edge) * difference + edge)), (
            "a mixture of the share that was seen and of the worst or the best"
        )
