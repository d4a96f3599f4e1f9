"""Intervals, tests and correlations of all studies: one estimate, one Wilson interval, one bootstrap.

All are seeded. What is compared is paired, and pictures are drawn anew, not questions: those about one picture are not
independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tokenprune.errors import InputError

Array = NDArray[np.float64]
Z95 = 1.959963984540054
"""Standard deviations on each side of a normal mean that hold 95 %."""
DRAWS = 4000
"""Bootstrap samples behind a 95 % interval; their seed is fixed."""
FEWEST = 8
"""Pictures below which `over_pictures` gives no interval: a bootstrap of so few would be too narrow."""
FLIPS = 9_999
"""Sign patterns drawn where there are too many to try all of them."""
_ALL = 13
"""Pictures up to which all sign patterns are tried: 8192."""
_CHUNK = 4_000_000
"""Resampled pictures held in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; the ends are None where too little was seen to tell."""

    value: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of the interval, where there is one."""
        if self.low is None or self.high is None:
            raise InputError(f"estimate {self.value}: too little was seen for an interval")
        return self.low, self.high

    def above(self, other: float) -> bool:
        """Whether the whole interval lies above `other`."""
        return self.low is not None and self.low > other

    def below(self, other: float) -> bool:
        """Whether the whole interval lies below `other`."""
        return self.high is not None and self.high < other

    def to_dict(self) -> dict[str, float | None]:
        """Plain data, ready for JSON."""
        return asdict(self)


def wilson(right: float, n: int, *, z: float = Z95) -> tuple[float, float]:
    """Wilson interval of the share `right` / `n` of independent trials.

    Args:
        right: successes, 0 to `n`.
        n: trials, at least 1.
        z: standard deviations on each side.

    Raises:
        InputError: no trials, or more successes than trials.
    """
    if n < 1 or not 0 <= right <= n:
        raise InputError(f"wilson: expected 0 to n successes of n >= 1 trials, got {right} of {n}")
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(count: int, total: int) -> Estimate:
    """`count` of `total` (at least 1) with Wilson's interval (Wilson 1927), which also holds near 0 and 1."""
    return Estimate(count / total, *wilson(count, total))


def bootstrap(clusters: Array, of: Callable[[Array], Array], *, draws: int = DRAWS, seed: int = 0) -> Array:
    """`of` the sums over `draws` bootstrap samples of whole clusters, ``[draws]``.

    Args:
        clusters: ``[N, C]``, what each cluster (a picture) adds to the C sums.
        of: from sums ``[draws, C]`` to the number of interest.
        draws: bootstrap samples.
        seed: the same seed and N, the same clusters drawn.
    """
    size = len(clusters)
    rng = np.random.default_rng(seed)
    found = np.empty(draws)
    step = max(1, _CHUNK // size)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, draws, step):
            part = found[start : start + step]
            chosen = rng.integers(size, size=(len(part), size), dtype=np.int32)
            part[:] = of(clusters[chosen].sum(1))
    return found


def over_pictures(each: Array, of: Callable[[Array], Array]) -> Estimate:
    """`of` the means over pictures of the columns of ``[pictures, C]``, with a percentile bootstrap over pictures.

    Draws in which `of` is no number are left out. With fewer than `FEWEST` pictures there is no interval.
    """
    value = float(of(each.mean(0)))
    if len(each) < FEWEST:
        return Estimate(value, None, None)
    drawn = bootstrap(each, lambda sums: of(sums / len(each)))
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
    return Estimate(value, min(float(low), value), max(float(high), value))


def resampled_means(scores: Array, clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0) -> Array:
    """Means of `scores` in `draws` bootstrap samples of whole clusters, ``[draws]``.

    Args:
        scores: ``[N]``, one of each question.
        clusters: the picture of each question; questions of a picture stay together.
        draws: bootstrap samples.
        seed: the same seed, the same samples: two calls with equal clusters resample the same pictures.

    Raises:
        InputError: no scores, or not one cluster for each of them.
    """
    sums, counts = _by_cluster(scores, clusters)
    return bootstrap(np.stack([sums, counts], axis=1), lambda drawn: drawn[:, 0] / drawn[:, 1], draws=draws, seed=seed)


def accuracy(scores: Array, clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Mean of `scores` (1 right, 0 wrong, in between an average over draws) with a 95 % interval.

    One question a picture, each right or wrong: Wilson's interval. Otherwise the bootstrap over pictures; where all
    scores are equal it has nothing to resample, and Wilson's interval for as many trials as pictures stands in.
    """
    scores = np.asarray(scores, np.float64)
    _check(scores, clusters)
    value, pictures = float(scores.mean()), len(set(clusters))
    independent = pictures == len(scores) and bool(np.isin(scores, (0.0, 1.0)).all())
    if independent or np.ptp(scores) == 0:
        return Estimate(value, *wilson(value * pictures, pictures))
    low, high = np.quantile(resampled_means(scores, clusters, seed=seed), (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def difference(scores: Array, reference: Array, clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Mean of `scores` minus mean of `reference` on the same questions: paired, resampled by picture.

    Raises:
        InputError: the two do not have the same length.
    """
    gaps = _gaps(scores, reference)
    low, high = np.quantile(resampled_means(gaps, clusters, seed=seed), (0.025, 0.975))
    return Estimate(float(gaps.mean()), float(low), float(high))


def sign_flip(scores: Array, reference: Array, clusters: Sequence[Hashable], *, seed: int = 0) -> float:
    """Two-sided p-value of the paired difference: how often chance alone makes one at least as large.

    If the two conditions are alike, it does not matter which one is called the first: the sign of the difference may be
    flipped picture by picture (Fisher's randomisation test, 1935, with whole pictures as units). Up to 13 pictures that
    show any difference all patterns are tried, and the p-value is exact. Beyond that `FLIPS` patterns are drawn, and
    the one that was seen counts as one of them, so that the test never errs more often than it says (Phipson and Smyth
    2010, arXiv:1603.05766).

    Args:
        scores: ``[N]``, one of each question.
        reference: ``[N]``, of the same questions.
        clusters: the picture of each question.
        seed: of the patterns.

    Raises:
        InputError: the two do not have the same length, or no scores.
    """
    sums, _ = _by_cluster(_gaps(scores, reference), clusters)
    sums = sums[np.abs(sums) > 1e-9]  # averages over draws leave rounding; a picture without difference has no sign
    seen = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if len(sums) <= _ALL:
        patterns = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((np.abs((2 * patterns - 1) @ sums) >= seen).mean())
    rng = np.random.default_rng(seed)
    step, larger = max(1, _CHUNK // len(sums)), 0
    for start in range(0, FLIPS, step):
        signs = 2.0 * rng.integers(2, size=(min(step, FLIPS - start), len(sums)), dtype=np.int8) - 1.0
        larger += int((np.abs(signs @ sums) >= seen).sum())
    return (larger + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: all that stay below 5 % hold together with an error of 5 % in the family.

    Holm (1979): the smallest of n is multiplied by n, the next by n - 1, and so on; none falls below one before it. It
    holds however the comparisons depend on each other.

    Raises:
        InputError: a value outside of 0 to 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise InputError(f"holm: expected p-values in [0, 1], got {list(p_values)}")
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = most
    return adjusted


def median_ratio(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """How many times longer `before` took than `after`: the median over pairs, with its bootstrap interval.

    The bootstrap over pairs needs no drawing. Of n pairs drawn anew, the median is at most the k-th smallest of all
    ratios exactly when at least (n + 1) / 2 of them are, which is binomial (Maritz and Jarrett 1978). The interval is
    2.5 % … 97.5 % of that distribution. It covers the noise of this run, not that of other machines or other days.

    Args:
        before: seconds of one side, above 0, one for each pair.
        after: seconds of the other side.

    Raises:
        InputError: not as many of one as of the other, an even number of them, or a time that is not above 0.
    """
    n = len(before)
    if n != len(after) or n % 2 == 0:
        raise InputError(f"ratio: expected an odd number of pairs, got {n} and {len(after)} times")
    if min(*before, *after) <= 0:
        raise InputError("ratio: times must be above 0")
    ratios = sorted(first / second for first, second in zip(before, after, strict=True))
    reached = stats.binom.sf((n + 1) // 2 - 1, n, np.arange(1, n + 1) / n)
    low, high = (next(x for x, share in zip(ratios, reached, strict=True) if share >= tail) for tail in (0.025, 0.975))
    return Estimate(median(ratios), low, high)


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
    a, b = stats.rankdata(x), stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    size = float((a @ a) * (b @ b)) ** 0.5
    return float(a @ b) / size if size else None


def _gaps(scores: Array, reference: Array) -> Array:
    if len(scores) != len(reference):
        raise InputError(f"difference: expected two answers to each question, got {len(scores)} and {len(reference)}")
    return np.asarray(scores, np.float64) - np.asarray(reference, np.float64)


def _by_cluster(scores: Array, clusters: Sequence[Hashable]) -> tuple[Array, Array]:
    """Sum of the scores of each cluster, and how many they are."""
    _check(scores, clusters)
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.bincount(index, weights=scores).astype(np.float64), np.bincount(index).astype(np.float64)


def _check(scores: Array, clusters: Sequence[Hashable]) -> None:
    if not len(scores) or len(scores) != len(clusters):
        raise InputError(f"bootstrap: expected a cluster for each score, got {len(clusters)} for {len(scores)}")
