"""Statistics of scores: of a (rows, samples) table where every row has as many samples, of any list otherwise. Pure
functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

from stages.intervals import of_equal_scores

Table = NDArray[np.float64]
ROUNDING = 1e-12
"""By which means of equal scores may differ."""


def bootstrap_interval(per_row: Table, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling rows. (rows,) in 0..1 -> (low, high). Samples of one row are not
    independent; rows are. Where all rows are equal, Wilson's."""
    if np.ptp(per_row) < ROUNDING:
        return of_equal_scores(float(per_row[0]), len(per_row))
    rng = np.random.default_rng(seed)
    means = [per_row[rng.integers(0, len(per_row), len(per_row))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def grouped_interval(
    values: Sequence[float], groups: Sequence[int], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of values in 0..1 that come in groups, such as the completions of a row;
    whole groups are resampled. With one value a group, `bootstrap_interval`. Where all groups have one mean,
    Wilson's."""
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    means = sums / counts
    if np.ptp(means) < ROUNDING:
        return of_equal_scores(float(means[0]), len(means))
    rng = np.random.default_rng(seed)
    picks = (rng.integers(0, len(sums), len(sums)) for _ in range(resamples))
    low, high = np.percentile([sums[pick].sum() / counts[pick].sum() for pick in picks], [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(passed: Table, k: int) -> float:
    """Chance that at least one of k samples passes, estimated without bias from n >= k samples a row: 1 - C(n-c, k) /
    C(n, k), c of them passing (arXiv 2107.03374, equation 1). (rows, n) of 0/1 -> mean over rows."""
    n = passed.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in passed.sum(axis=1)]))
