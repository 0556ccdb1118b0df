"""Intervals that need no resampling. Pure functions, and no numpy, so that both halves may use them."""

from __future__ import annotations

from math import sqrt

Interval = tuple[float, float]


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> Interval:
    """95 % score interval of a share (Wilson 1927, JASA 22, 209-212), in 0..1 and never empty, for independent trials,
    of which there is one at least."""
    share, spread = successes / trials, z * z / trials
    centre = share + spread / 2
    half = z * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def of_equal_scores(score: float, rows: int) -> Interval:
    """95 % interval of a mean score, 0..1, where every row has the same one: there is no spread to resample, and other
    rows may well differ. Wilson's, with a trial a row."""
    return wilson_interval(score * rows, rows)


def of_equal_differences(difference: float, rows: int) -> Interval:
    """The same of a difference of two scores, -1..1: a share of all rows, of which none was seen, may have any other
    difference. Wilson's upper end for none of the rows bounds that share."""
    unseen = wilson_interval(0, rows)[1]
    return difference - unseen * (1 + difference), difference + unseen * (1 - difference)
