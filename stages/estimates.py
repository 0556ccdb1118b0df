"""Statistics of repeated samples per row. Pure functions on a (rows, samples) table of scores."""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


def bootstrap_interval(per_row: Table, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling rows. (rows,) -> (low, high). Samples of one row are not independent; rows are."""
    rng = np.random.default_rng(seed)
    means = [per_row[rng.integers(0, len(per_row), len(per_row))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(passed: Table, k: int) -> float:
    """Chance that at least one of k samples passes, estimated without bias from n >= k samples a row: 1 - C(n-c, k) / C(n, k), c of them
    passing (arXiv 2107.03374, equation 1). (rows, n) of 0/1 -> mean over rows."""
    n = passed.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in passed.sum(axis=1)]))
