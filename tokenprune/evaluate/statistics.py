"""Intervals for accuracies: NumPy only, seeded, and aware that questions about one picture are not independent."""

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
    _check(scores, clusters)
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    size = len(numbers)
    sums, counts = np.bincount(index, weights=scores), np.bincount(index)
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
    if len(scores) != len(reference):
        raise InputError(f"difference: expected two answers to each question, got {len(scores)} and {len(reference)}")
    gaps = np.asarray(scores, np.float64) - np.asarray(reference, np.float64)
    low, high = np.quantile(resampled_means(gaps, clusters, seed=seed), (0.025, 0.975))
    return Estimate(float(gaps.mean()), float(low), float(high))


def _check(scores: NDArray[np.float64], clusters: Sequence[Hashable]) -> None:
    if not len(scores) or len(scores) != len(clusters):
        raise InputError(f"bootstrap: expected a cluster for each score, got {len(clusters)} for {len(scores)}")
