"""Ratios of times that were taken in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tokenprune.errors import InputError


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios, with a 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def ratio(before: Sequence[float], after: Sequence[float]) -> Ratio:
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
    reached = [_at_least((n + 1) // 2, n, k / n) for k in range(1, n + 1)]
    low, high = (next(x for x, share in zip(ratios, reached, strict=True) if share >= tail) for tail in (0.025, 0.975))
    return Ratio(median(ratios), low, high)


def _at_least(successes: int, trials: int, chance: float) -> float:
    """The chance of so many successes or more."""
    return math.fsum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes, trials + 1)
    )
