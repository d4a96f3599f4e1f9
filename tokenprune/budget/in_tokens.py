"""The largest plan that does not exceed a budget in vision tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from tokenprune.budget.path import bisect, realise, scaled, shape_of
from tokenprune.budget.rule import Budget, BudgetKind, count_of
from tokenprune.budget.steps import Step
from tokenprune.core.tokens import Grid
from tokenprune.errors import BudgetError

MANY = 10**9
"""Vision tokens at which a share is judged, where no rounding to whole tokens is left."""


def solve_tokens(
    stages: Sequence[Step], budget: Budget, depth: int, total: int, grids: Sequence[Grid]
) -> tuple[int, ...]:
    """Counts to keep; arguments as in `plan`."""
    fixed, weights, layers = _weights(stages, budget.kind, depth)
    target = count_of(budget.value, total) * layers

    def cost(wanted: Sequence[int]) -> int:
        sizes = realise(stages, wanted, total)[1]
        return fixed * total + sum(weight * size for weight, size in zip(weights, sizes, strict=True))

    lowest = [0] * len(stages)
    if cost(lowest) > target:
        refuse(stages, budget, depth, total)
        return realise(stages, lowest, total)[0]  # a share that would be met if only there were more tokens
    if target >= total * layers:
        return (total,) * len(stages)
    shape = shape_of(stages, total, grids)
    below, above = bisect(lambda factor: cost(scaled(shape, factor)) > target, 2.0 * total / min(shape))
    # The smallest factor that costs as much, so that a recipe's own cost gives back its own counts at every stage.
    best = cost(scaled(shape, below))
    wanted = scaled(shape, bisect(lambda factor: cost(scaled(shape, factor)) >= best, above)[1])
    # Several stages may step up at the same factor: take those that still fit, the earliest first.
    for index, size in enumerate(scaled(shape, above)):
        more = [*wanted[:index], size, *wanted[index + 1 :]]
        wanted = more if cost(wanted) < cost(more) <= target else wanted
    return realise(stages, wanted, total)[0]


def _weights(stages: Sequence[Step], kind: BudgetKind, depth: int) -> tuple[int, list[int], int]:
    """Layers that count and see all tokens, layers that see what each stage left, layers in all."""
    if kind == "final":
        return 0, [0] * (len(stages) - 1) + [1], 1
    edges = [*(step.layer for step in stages), depth]
    weights = [after - before for before, after in pairwise(edges)]
    return (0, weights, depth - edges[0]) if kind == "keep" else (edges[0], weights, depth)


def refuse(stages: Sequence[Step], budget: Budget, depth: int, total: int) -> None:
    """Raise if the stages cannot go as low as `budget` for a sample of `total` vision tokens."""
    minimum = _minimum(stages, budget.kind, depth, total)
    target: float = count_of(budget.value, total)
    reach, nearest = f"{float(minimum):.5g} … {total} of {total} vision tokens", str(math.ceil(minimum))
    if budget.is_share:
        minimum, target = _minimum(stages, budget.kind, depth, MANY) / MANY, budget.value
        reach, nearest = f"{float(minimum):.4g} … 1.0", str(math.ceil(minimum * 1000) / 1000)
    if target >= minimum:
        return
    layers = sorted({step.layer for step in stages})
    acts = f"before layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} of {depth}"
    raise BudgetError(
        f"budget {budget}: stages that act {acts} can reach {reach}; "
        f"the nearest valid budget is {budget.kind}: {nearest}"
    )


def _minimum(stages: Sequence[Step], kind: BudgetKind, depth: int, total: int) -> Fraction:
    """The smallest value of the stated quantity, in tokens."""
    fixed, weights, layers = _weights(stages, kind, depth)
    sizes = realise(stages, [0] * len(stages), total)[1]
    return Fraction(fixed * total + sum(weight * size for weight, size in zip(weights, sizes, strict=True)), layers)
