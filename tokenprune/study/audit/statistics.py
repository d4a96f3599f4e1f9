"""Numbers of an audit: intervals over pictures, unevenness of counts, rank correlation. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FEWEST = 8
"""Pictures that a bootstrap needs: of fewer it says more than they know."""
DRAWS = 1000
"""Bootstrap samples of pictures behind a 95 % interval; their seed is fixed."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval over pictures; the ends are None where too few were seen to tell."""

    value: float
    low: float | None
    high: float | None

    def above(self, other: float) -> bool:
        """Whether the whole interval lies above `other`."""
        return self.low is not None and self.low > other

    def below(self, other: float) -> bool:
        """Whether the whole interval lies below `other`."""
        return self.high is not None and self.high < other


def share(count: int, total: int) -> Estimate:
    """`count` of `total` with Wilson's 95 % interval (Wilson 1927), which also holds near 0 and 1; total is not 0."""
    z2, p = 1.959964**2, count / total
    middle, spread = p + z2 / (2 * total), (z2 * (p * (1 - p) + z2 / (4 * total)) / total) ** 0.5
    return Estimate(p, max(0.0, (middle - spread) / (1 + z2 / total)), min(1.0, (middle + spread) / (1 + z2 / total)))


def estimate(each: Array, of: Callable[[Array], Array]) -> Estimate:
    """`of` the means of the columns of ``[pictures, C]``, with a percentile bootstrap over pictures."""
    value = float(of(each.mean(0)))
    if len(each) < FEWEST:
        return Estimate(value, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = of(_weights(len(each)) @ each)
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
    return Estimate(value, min(float(low), value), max(float(high), value))


@lru_cache(maxsize=8)
def _weights(pictures: int) -> Array:
    """``[DRAWS, pictures]``: how often each picture is drawn, over their number."""
    counts = np.random.default_rng(0).multinomial(pictures, np.full(pictures, 1 / pictures), size=DRAWS)
    return counts / pictures


def uneven(along: Array) -> tuple[float, float]:
    """Chi-square of counts against equal ones, and Cramér's V of it."""
    count, degrees = along.sum(), len(along) - 1
    if not count or not degrees:
        return 0.0, 0.0
    chi_square = float(((along - count / len(along)) ** 2).sum() * len(along) / count)
    return chi_square, (chi_square / (float(count) * degrees)) ** 0.5


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's: Pearson's correlation of the ranks ``[N]``, equal numbers sharing their mean rank.

    None where one of the two is all equal, or there are fewer than two.
    """
    if len(x) < 2:
        return None
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = float((a @ a) * (b @ b)) ** 0.5
    return float(a @ b) / size if size else None


def _ranks(x: Array) -> Array:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)


def total(masks: Iterable[NDArray[Any]], height: int, width: int) -> Array:
    """Sum of masks ``[h, w]``, each resampled by area to ``[height, width]``; what they add up to stays."""
    summed = np.zeros((height, width))
    for mask in masks:
        summed += overlap(height, mask.shape[0]) @ mask @ overlap(width, mask.shape[1]).T
    return summed


@lru_cache(maxsize=256)
def overlap(new: int, old: int) -> Array:
    """``[new, old]``: share of each of `old` equal intervals that lies in each of `new` ones; columns sum to 1."""
    i, j = np.arange(new)[:, None], np.arange(old)[None, :]
    inside = np.minimum((i + 1) * old, (j + 1) * new) - np.maximum(i * old, j * new)
    return np.clip(inside, 0, None) / new
