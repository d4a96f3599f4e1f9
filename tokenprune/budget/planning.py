"""`plan`: from stages and a budget to counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tokenprune.budget.in_flops import Prices, solve_flops
from tokenprune.budget.in_tokens import MANY, refuse, solve_tokens
from tokenprune.budget.rule import Budget, count_of
from tokenprune.budget.steps import StaticSchedule, Step, check_order
from tokenprune.core.tokens import Grid
from tokenprune.errors import BudgetError


def plan(
    stages: Sequence[Step],
    budget: Budget | None,
    *,
    depth: int,
    total: int,
    grids: Sequence[Grid],
    prices: Prices | None = None,
) -> tuple[int | None, ...]:
    """How many tokens each stage keeps (what its recycler adds comes on top), None where only the data can tell.

    Without a budget, static schedulers decide; after the first adaptive one nothing is known. With a budget, the
    schedulers' nominal counts give a shape, and one factor scales it: the largest plan that does not exceed the budget,
    less than one token below it. A larger budget never gives a smaller count at any stage; a full one keeps everything.

    Args:
        stages: in the order in which they act.
        budget: for the whole recipe, or None.
        depth: decoder layers of the model.
        total: original vision tokens of the sample.
        grids: (T, H, W) of each of its images.
        prices: of this prompt on this model; only a budget ``flops`` asks for them.

    Raises:
        BudgetError: stages out of order or beyond `depth`, or a budget that they cannot meet.
    """
    check_order(stages, depth)
    if not stages:
        if budget is not None and _saves(budget, total):
            raise BudgetError(f"budget {budget}: this recipe has no stages, so it keeps all {total} vision tokens")
        return ()
    if total == 0:
        return tuple(0 for _ in stages) if budget else tuple(0 if step.scheduler.static else None for step in stages)
    if budget is None:
        return _chain(stages, total, grids)
    if budget.kind == "flops":
        if prices is None:
            raise BudgetError(f"budget {budget}: what a plan costs depends on the model and the prompt")
        return solve_flops(stages, budget, total, grids, prices)
    return solve_tokens(stages, budget, depth, total, grids)


def check_share(stages: Sequence[Step], budget: Budget | None, *, depth: int) -> None:
    """Raise `BudgetError` if the budget is a share that the stages cannot meet, as far as no picture is needed to tell.

    What ``flops`` can reach depends on the prompt: nothing is refused here.
    """
    if budget is not None and budget.kind != "flops" and budget.is_share and stages:
        refuse(stages, budget, depth, MANY)


def _saves(budget: Budget, total: int) -> bool:
    """Whether the budget leaves less than everything."""
    return budget.value < 1.0 if budget.kind == "flops" else count_of(budget.value, total) < total


def _chain(stages: Sequence[Step], total: int, grids: Sequence[Grid]) -> tuple[int | None, ...]:
    size: int | None = total
    counts: list[int | None] = []
    for step in stages:
        if size is not None and step.scheduler.static:
            kept = cast("StaticSchedule", step.scheduler).count(size, total=total, grids=grids)
            size = kept + step.recycler.added(size - kept)
            counts.append(kept)
        else:
            size = None
            counts.append(None)
    return tuple(counts)
