"""The solver: from stages and a budget to the counts that each stage keeps of one sample.

    schedulers ─▶ nominal sizes: the tokens after each stage that they have in mind, as real numbers
               ─▶ one factor scales all of them: candidates in a row, from everything down to one token a stage
    a budget   ─▶ the largest candidate that does not exceed it

What a candidate wants behind a stage includes what the recycler adds; `_counts_and_sizes` turns it into the count to
keep. All of it is host arithmetic on plain numbers. Stages as seen here are in steps.py, rounding in rule.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Protocol, cast

from tokenprune.budget.rule import Budget, BudgetKind, count_of, part_of
from tokenprune.budget.steps import Recycle, StaticSchedule, Step, check_order
from tokenprune.core.grids import Grid
from tokenprune.errors import BudgetError

MANY = 10**9
"""A picture so large that rounding to whole tokens does not matter: shares are checked on it, without a picture."""


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
    schedulers' nominal counts give the proportions, and one factor scales them: the largest plan that does not exceed
    the budget, less than one token below it. A larger budget never gives a smaller count at any stage; a full one keeps
    everything.

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
    _check_final(stages, budget)
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
        return _solve_flops(stages, budget, total, grids, prices)
    return _solve_tokens(stages, budget, depth, total, grids)


def check_share(stages: Sequence[Step], budget: Budget | None, *, depth: int) -> None:
    """Raise `BudgetError` if the budget is a share that the stages cannot meet, as far as no picture is needed to tell.

    What ``flops`` can reach depends on the prompt: nothing is refused here.
    """
    _check_final(stages, budget)
    if budget is not None and budget.kind != "flops" and budget.is_share and stages:
        _refuse(stages, budget, depth, MANY)


def _check_final(stages: Sequence[Step], budget: Budget | None) -> None:
    if budget is not None and budget.kind == "final" and any(step.empties for step in stages):
        raise BudgetError(f"budget {budget}: a stage keeps no token, so none is left; expected keep, average or flops")


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


def _solve_tokens(
    stages: Sequence[Step], budget: Budget, depth: int, total: int, grids: Sequence[Grid]
) -> tuple[int, ...]:
    """Counts to keep under a budget in vision tokens; arguments as in `plan`.

    More tokens behind a stage never cost less here, so the factor is bisected over the whole cost.
    """
    fixed, weights, layers = _weights(stages, budget.kind, depth)
    target = count_of(budget.value, total) * layers

    def cost(wanted: Sequence[int]) -> int:
        sizes = _counts_and_sizes(stages, wanted, total)[1]
        return fixed * total + sum(weight * size for weight, size in zip(weights, sizes, strict=True))

    lowest = [0] * len(stages)  # wanted, and raised to what each stage must keep
    if cost(lowest) > target:
        _refuse(stages, budget, depth, total)
        # The share is reachable in general; with so few tokens rounding up to 1 exceeds it, so the minimum is kept.
        return _counts_and_sizes(stages, lowest, total)[0]
    if target >= total * layers:
        return (total,) * len(stages)
    nominal = _nominal_sizes(stages, total, grids)
    # Every stage wants more than there is, so this factor exceeds the budget (or all plans that the stages can make
    # are within it, because one of them drops every token).
    high = _enough(nominal, total)
    below, above = _bisect(lambda factor: cost(_wanted_at(nominal, factor)) > target, high)
    # Many factors may cost the same: under `final`, earlier stages grow while the last keeps its count. The smallest
    # of them is taken, so that a budget of what the recipe's own counts cost gives these counts back at every stage.
    best = cost(_wanted_at(nominal, below))
    wanted = _wanted_at(nominal, _bisect(lambda factor: cost(_wanted_at(nominal, factor)) >= best, above)[1])
    # At `above`, several stages may want one token more at once: too many together, but some of them may still fit.
    for index, size in enumerate(_wanted_at(nominal, above)):
        more = [*wanted[:index], size, *wanted[index + 1 :]]
        wanted = more if cost(wanted) < cost(more) <= target else wanted
    return _counts_and_sizes(stages, wanted, total)[0]


def _weights(stages: Sequence[Step], kind: BudgetKind, depth: int) -> tuple[int, list[int], int]:
    """How often each number of tokens counts in a budget: all tokens, what each stage leaves, and the sum of both."""
    if kind == "final":
        return 0, [0] * (len(stages) - 1) + [1], 1
    edges = [*(step.layer for step in stages), depth]
    weights = [after - before for before, after in pairwise(edges)]
    return (0, weights, depth - edges[0]) if kind == "keep" else (edges[0], weights, depth)


def _refuse(stages: Sequence[Step], budget: Budget, depth: int, total: int) -> None:
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
    sizes = _counts_and_sizes(stages, [0] * len(stages), total)[1]
    return Fraction(fixed * total + sum(weight * size for weight, size in zip(weights, sizes, strict=True)), layers)


class Prices(Protocol):
    """What the prefill of one prompt costs, in multiply-adds; see `tokenprune.cost.prices.PromptPrices`."""

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


def _solve_flops(
    stages: Sequence[Step], budget: Budget, total: int, grids: Sequence[Grid], prices: Prices
) -> tuple[int, ...]:
    """Counts to keep under a budget in multiply-adds; arguments as in `plan`.

    The candidates stand in a row, each with one token more at one stage than the one before. A dearer plan may come
    before a cheaper one, because a stage that keeps all that enters it does not run; so the answer is the last of all
    that do not exceed the budget, not the first place where the next one would.

    Raises:
        BudgetError: no plan is that cheap.
    """
    target = part_of(budget.value, prices.untouched)
    if target >= prices.untouched:
        return (total,) * len(stages)
    candidates = _Candidates(stages, total, grids, prices)
    for counts, cost in candidates.down_from(target):
        if cost <= target:
            return counts
    least = min(cost for _, cost in candidates.down_from(candidates.lowest))
    reach = Fraction(min(least, prices.untouched), prices.untouched)
    layers = ", ".join(map(str, sorted({step.layer for step in stages})))
    raise BudgetError(
        f"budget {budget}: on a prompt of {prices}, stages that act before layer {layers} can reach "
        f"{float(reach):.4g} … 1.0 of the untouched prefill; the nearest valid budget is "
        f"flops: {math.ceil(reach * 1000) / 1000}"
    )


class _Candidates:
    """All plans that one factor makes of the schedulers' nominal sizes, in a row, for a budget in multiply-adds.

    Where several stages want one token more at the same factor, they get it one by one, the earliest first: else the
    plans in between, which may be the largest that fit, would be left out.
    """

    def __init__(self, stages: Sequence[Step], total: int, grids: Sequence[Grid], prices: Prices) -> None:
        self.stages = stages
        self.total = total
        self.prices = prices
        # Exact, so that rounding never decides which stage comes first.
        self.nominal = [Fraction(size) for size in _nominal_sizes(stages, total, grids)]

    @property
    def lowest(self) -> int:
        """Cost of the plan that keeps least."""
        return self.prices.whole(_counts_and_sizes(self.stages, [0] * len(self.stages), self.total)[0])

    def down_from(self, target: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """Plans and their costs, from the first that may fit `target` down to the lowest.

        The model alone never costs less with more tokens, so the start is bisected: above it, the model alone exceeds
        `target`. The whole cost cannot be bisected: it falls where a stage keeps everything and no longer runs.
        """
        high = _enough(self.nominal, self.total)
        wanted = self._at(_bisect(lambda factor: self._model(self._at(factor)) > target, high)[1])
        before: tuple[int, ...] | None = None
        while True:
            counts = _counts_and_sizes(self.stages, wanted, self.total)[0]
            if counts != before:
                yield counts, self.prices.whole(counts)
            if not any(wanted):
                return
            before = counts
            # Undo the most recent increment: the stage whose count was reached at the largest factor.
            grown = [stage for stage, want in enumerate(wanted) if want]
            last = max(grown, key=lambda stage: (wanted[stage] / self.nominal[stage], stage))
            wanted[last] -= 1

    def _model(self, wanted: Sequence[int]) -> int:
        return self.prices.model(_counts_and_sizes(self.stages, wanted, self.total)[1])

    def _at(self, factor: float) -> list[int]:
        return [min(self.total, math.floor(Fraction(factor) * size)) for size in self.nominal]


def _bisect(enough: Callable[[float], bool], high: float) -> tuple[float, float]:
    """Neighbouring factors: the first is not `enough` (or 0), the second is, as `high` must be.

    `enough` never turns back to False at larger factors.
    """
    low = 0.0
    for _ in range(64):  # down to a distance of high / 2**64: fewer would do for whole tokens
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return low, high


def _enough(nominal: Sequence[float | Fraction], total: int) -> float:
    """A factor at which every stage that does not drop all wants more than there is."""
    return float(2 * total / min((size for size in nominal if size), default=1))


def _nominal_sizes(stages: Sequence[Step], total: int, grids: Sequence[Grid]) -> list[float]:
    """Tokens after each stage as the schedulers would have it, merged ones included: real numbers above 0; or 0 from a
    stage on that drops all."""
    size, sizes = total, []
    for step in stages:
        kept = min(float(size), max(1e-6, step.scheduler.nominal(size, total=total, grids=grids)))
        kept = 0.0 if step.empties else kept
        # A recycler counts whole tokens; 0.29 * 100 is 28.999999999999996, and means 29.
        left = kept + step.recycler.added(size - min(size, max(1 - step.empties, math.floor(kept + 1e-9))))
        sizes.append(min(left, float(size)))
        size = max(1, round(sizes[-1])) if sizes[-1] else 0
    return sizes


def _wanted_at(nominal: Sequence[float], factor: float) -> list[int]:
    """Tokens wanted after each stage: the nominal sizes times `factor`, rounded down."""
    return [math.floor(factor * size) for size in nominal]


def _counts_and_sizes(
    stages: Sequence[Step], wanted: Sequence[int], total: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Counts to keep, and tokens after each stage: as near below the `wanted` ones as the recyclers allow."""
    size, counts, sizes = total, [], []
    for step, want in zip(stages, wanted, strict=True):
        kept = 0 if step.empties or not size else _largest_kept(want, size, step.recycler)
        size = kept + step.recycler.added(size - kept)
        counts.append(kept)
        sizes.append(size)
    return tuple(counts), tuple(sizes)


def _largest_kept(want: int, size: int, recycler: Recycle) -> int:
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
