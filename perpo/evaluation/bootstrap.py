"""Percentile-bootstrap confidence intervals for any figure that is a function of sums over records.

N records are drawn with replacement from N. A draw is a row of counts c [N], and a figure of the draw is f(c · X). X
[N, F] holds each record's terms of the sums: (value, 1) for a mean, n-gram counts for corpus BLEU. All figures of all
models share X and so see the same draws, which makes the interval of a difference between two models *paired*.
The work is one matrix product, [draws, N] · [N, F].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENOUGH = 30  # records: percentile intervals of fewer claim more than they know
TOO_FEW = "too few records"
_BLOCK = 2_000_000  # drawn records held at a time


class Interval(NamedTuple):
    """A figure with its confidence interval; NaN where there is nothing, or too little, to compute it from."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def words(self, digits: int = 3, sign: str = "") -> str:
        """The interval alone: "[0.210, 0.340]", or that there are too few records."""
        if math.isnan(self.low):
            return f"({TOO_FEW})"
        return f"[{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def draw_counts(n: int, draws: int, seed: int) -> Iterator[Array]:
    """How often each of n records is drawn: blocks [b, n], `draws` rows in all, the same for the same arguments."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    for start in range(0, draws, rows):
        b = min(rows, draws - start)
        drawn = generator.integers(0, n, size=(b, n)) + n * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n).astype(np.float64)


def resampled_sums(terms: Array, draws: int, seed: int) -> Array:  # [N, F] -> [draws, F]
    """Sums of every column over every draw.

    Raises:
        ValueError: no record, or no draw.
    """
    if terms.ndim != 2 or not len(terms):
        raise ValueError(f"terms must be [N, F] with a row for at least one record, got shape {terms.shape}")
    if draws < 1:
        raise ValueError(f"draws must be ≥ 1, got {draws}")
    return np.concatenate([counts @ terms for counts in draw_counts(len(terms), draws, seed)])


def interval(value: float, resampled: Array, confidence: float = 0.95, n: int = ENOUGH) -> Interval:
    """The percentile interval: the middle `confidence` of the figure's values over the draws [draws], of n records.

    Draws without a value (NaN: none of the records it is about was drawn) are left out. With n below `ENOUGH` there is
    the figure without an interval.
    """
    kept = resampled[~np.isnan(resampled)]
    if not len(kept) or np.isnan(value):
        return Interval(math.nan, math.nan, math.nan)
    if n < ENOUGH:
        return Interval(float(value), math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
