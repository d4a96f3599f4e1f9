"""The path of plans that a budget chooses from: one factor scales the counts that the schedulers have in mind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tokenprune.budget.steps import Recycle, Step
from tokenprune.core.tokens import Grid


def bisect(enough: Callable[[float], bool], high: float) -> tuple[float, float]:
    """Neighbouring factors: the first is not `enough` (or 0), the second is. `enough` never turns back to False."""
    low = 0.0
    for _ in range(64):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return low, high


def shape_of(stages: Sequence[Step], total: int, grids: Sequence[Grid]) -> list[float]:
    """Tokens after each stage as the schedulers would have it, real numbers above 0."""
    size, shape = total, []
    for step in stages:
        kept = min(float(size), max(1e-6, step.scheduler.nominal(size, total=total, grids=grids)))
        left = kept + step.recycler.added(size - max(1, math.floor(kept + 1e-9)))
        shape.append(min(left, float(size)))
        size = max(1, round(shape[-1]))
    return shape


def scaled(shape: Sequence[float], factor: float) -> list[int]:
    """`shape` times `factor`, rounded down."""
    return [math.floor(factor * size) for size in shape]


def realise(stages: Sequence[Step], wanted: Sequence[int], total: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Counts to keep and tokens after each stage, as near below `wanted` tokens as the recyclers allow."""
    size, counts, sizes = total, [], []
    for step, want in zip(stages, wanted, strict=True):
        kept = _kept_for(want, size, step.recycler)
        size = kept + step.recycler.added(size - kept)
        counts.append(kept)
        sizes.append(size)
    return tuple(counts), tuple(sizes)


def _kept_for(want: int, size: int, recycler: Recycle) -> int:
    """The largest count to keep of `size` tokens, at least 1, that leaves at most `want` tokens after recycling."""
    high = max(1, min(want, size))
    low = max(1, high - recycler.added(size - 1))
    while low < high:
        middle = (low + high + 1) // 2
        if middle + recycler.added(size - middle) <= want:
            low = middle
        else:
            high = middle - 1
    return low
