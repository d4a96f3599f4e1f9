"""Intervals and tests for accuracies: NumPy only, seeded; questions about one picture are not taken as independent."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputError

Z95 = 1.959963984540054
"""Standard deviations on each side of a normal mean that hold 95 %."""
DRAWS = 4000
FLIPS = 9_999
"""Sign patterns drawn where there are too many to try all of them."""
_ALL = 13
"""Pictures up to which all sign patterns are tried: 8192."""
_CHUNK = 4_000_000
"""Resampled pictures held in memory at once."""


class Estimate(NamedTuple):
    """A share or a difference of shares, with its 95 % interval."""

    value: float
    low: float
    high: float


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


def resampled_means(
    scores: NDArray[np.float64], clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
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
    size = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, _CHUNK // size)
    for start in range(0, draws, step):
        part = means[start : start + step]
        chosen = rng.integers(size, size=(len(part), size), dtype=np.int32)
        part[:] = sums[chosen].sum(1) / counts[chosen].sum(1)
    return means


def accuracy(scores: NDArray[np.float64], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
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


def difference(
    scores: NDArray[np.float64], reference: NDArray[np.float64], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """Mean of `scores` minus mean of `reference` on the same questions: paired, resampled by picture.

    Raises:
        InputError: the two do not have the same length.
    """
    gaps = _gaps(scores, reference)
    low, high = np.quantile(resampled_means(gaps, clusters, seed=seed), (0.025, 0.975))
    return Estimate(float(gaps.mean()), float(low), float(high))


def sign_flip(
    scores: NDArray[np.float64], reference: NDArray[np.float64], clusters: Sequence[Hashable], *, seed: int = 0
) -> float:
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


def _gaps(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(scores) != len(reference):
        raise InputError(f"difference: expected two answers to each question, got {len(scores)} and {len(reference)}")
    return np.asarray(scores, np.float64) - np.asarray(reference, np.float64)


def _by_cluster(
    scores: NDArray[np.float64], clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum of the scores of each cluster, and how many they are."""
    _check(scores, clusters)
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.bincount(index, weights=scores).astype(np.float64), np.bincount(index).astype(np.int64)


def _check(scores: NDArray[np.float64], clusters: Sequence[Hashable]) -> None:
    if not len(scores) or len(scores) != len(clusters):
        raise InputError(f"bootstrap: expected a cluster for each score, got {len(clusters)} for {len(scores)}")
