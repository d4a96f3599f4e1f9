"""The largest plan that does not exceed a share of the untouched prefill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol

from tokenprune.budget.path import bisect, realise, shape_of
from tokenprune.budget.rule import Budget, part_of
from tokenprune.budget.steps import Step
from tokenprune.core.tokens import Grid
from tokenprune.errors import BudgetError


class Prices(Protocol):
    """What the prefill of one prompt costs, in multiply-adds; see `tokenprune.cost.prices.Prefill`."""

    @property
    def untouched(self) -> int:
        """The prefill with all vision tokens, without any recipe."""
        ...

    def model(self, sizes: Sequence[int]) -> int:
        """The model alone when `sizes` tokens are left behind the stages; more tokens never cost less."""
        ...

    def whole(self, counts: Sequence[int]) -> int:
        """The model, and the recipe's own work, when the stages keep `counts`."""
        ...


def solve_flops(
    stages: Sequence[Step], budget: Budget, total: int, grids: Sequence[Grid], prices: Prices
) -> tuple[int, ...]:
    """Counts to keep; arguments as in `plan`.

    The candidates stand in a row, each with one token more at one stage than the one before. A dearer plan may come
    before a cheaper one, because a stage that keeps all that enters it does not run; so the answer is the last of all
    that do not exceed the budget, not the first place where the next one would.

    Raises:
        BudgetError: no plan is that cheap.
    """
    target = part_of(budget.value, prices.untouched)
    if target >= prices.untouched:
        return (total,) * len(stages)
    path = _Path(stages, total, grids, prices)
    for counts, cost in path.down_from(target):
        if cost <= target:
            return counts
    least = min(cost for _, cost in path.down_from(path.lowest))
    reach = Fraction(min(least, prices.untouched), prices.untouched)
    layers = ", ".join(map(str, sorted({step.layer for step in stages})))
    raise BudgetError(
        f"budget {budget}: on a prompt of {prices}, stages that act before layer {layers} can reach "
        f"{float(reach):.4g} … 1.0 of the untouched prefill; the nearest valid budget is "
        f"flops: {math.ceil(reach * 1000) / 1000}"
    )


class _Path:
    """All plans that one factor makes of the schedulers' counts; where several stages step up at once, one by one."""

    def __init__(self, stages: Sequence[Step], total: int, grids: Sequence[Grid], prices: Prices) -> None:
        self.stages = stages
        self.total = total
        self.prices = prices
        # Exact, so that the order of the steps never depends on rounding.
        self.shape = [Fraction(size) for size in shape_of(stages, total, grids)]

    @property
    def lowest(self) -> int:
        """Cost of the plan that keeps least."""
        return self.prices.whole(realise(self.stages, [0] * len(self.stages), self.total)[0])

    def down_from(self, target: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """Plans and their costs, from the largest whose model alone costs no more than `target` down to the lowest."""
        high = float(2 * self.total / min(self.shape))
        wanted = self._at(bisect(lambda factor: self._model(self._at(factor)) > target, high)[1])
        before: tuple[int, ...] | None = None
        while True:
            counts = realise(self.stages, wanted, self.total)[0]
            if counts != before:
                yield counts, self.prices.whole(counts)
            if not any(wanted):
                return
            before = counts
            # The latest of the steps below: it leads to the plan just before this one.
            last = max(range(len(wanted)), key=lambda stage: (wanted[stage] / self.shape[stage], stage))
            wanted[last] -= 1

    def _model(self, wanted: Sequence[int]) -> int:
        return self.prices.model(realise(self.stages, wanted, self.total)[1])

    def _at(self, factor: float) -> list[int]:
        return [min(self.total, math.floor(Fraction(factor) * size)) for size in self.shape]
