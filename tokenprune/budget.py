"""Budgets: the only place where a `keep` becomes a count, and the solver that turns a budget into counts per stage.

All counts are vision tokens of one sample, merged ones included; layers are decoder layers. Everything here is host
arithmetic on plain numbers: no tensors, no data, so that a static schedule is known before the first layer runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal, Protocol, cast, get_args

from tokenprune.errors import BudgetError, did_you_mean
from tokenprune.tokens import Grid

BudgetKind = Literal["keep", "average", "final"]

_MANY = 10**9
"""Vision tokens at which a share is judged, where no rounding to whole tokens is left."""


def count_of(keep: float, of: int) -> int:
    """How many of `of` vision tokens `keep` stands for: the one rounding rule of the package.

    Args:
        keep: a share in (0, 1], rounded down but never below one token; or a count, at most all tokens are kept.
        of: vision tokens that the keep refers to, 0 or more.

    Raises:
        BudgetError: a keep that is neither a share nor a count.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise BudgetError(f"keep must be a share in (0, 1] or a count of at least 1, got {keep!r}")
    if of < 0:
        raise BudgetError(f"cannot keep a part of {of} vision tokens")
    if isinstance(keep, int):
        if keep < 1:
            raise BudgetError(f"keep as a count must be at least 1, got {keep}")
        return min(keep, of)
    if not 0.0 < keep <= 1.0:
        raise BudgetError(f"keep as a share must lie in (0, 1], got {keep} (write a count without a decimal point)")
    # The nearest plain fraction undoes float error: 1 - 0.9 is 0.09999999999999998, yet a tenth of 10 tokens is 1.
    share = Fraction(keep).limit_denominator(10**9)
    return min(of, max(1, share.numerator * of // share.denominator))


@dataclass(frozen=True)
class Budget:
    """What a whole recipe may cost, in vision tokens per layer.

    Raises:
        BudgetError: an unknown kind, or a value that is neither a share nor a count.
    """

    kind: BudgetKind
    """``keep``: average over the layers from the recipe's first place on (with one place: exactly the survivors).
    ``average``: average over all layers, counted on layer inputs, which is what the layers really process.
    ``final``: tokens after the last stage."""
    value: float
    """A share in (0, 1] of the sample's original vision tokens, or a count."""

    def __post_init__(self) -> None:
        kinds = get_args(BudgetKind)
        if self.kind not in kinds:
            raise BudgetError(
                f"budget: expected one of {', '.join(kinds)}, got {self.kind!r}{did_you_mean(self.kind, kinds)}"
            )
        try:
            count_of(self.value, 1)
        except BudgetError as error:
            raise BudgetError(f"budget {self}: {error}") from None

    @property
    def is_share(self) -> bool:
        return isinstance(self.value, float)

    def __str__(self) -> str:
        return f"{self.kind}: {self.value!r}"


class Schedule(Protocol):
    """What the solver asks of a scheduler; see `tokenprune.parts.schedulers`."""

    @property
    def static(self) -> bool: ...

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float: ...


class StaticSchedule(Schedule, Protocol):
    """A schedule that is `static`: its count follows from shapes alone."""

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int: ...


class Recycle(Protocol):
    """What the solver asks of a recycler; see `tokenprune.parts.recyclers`."""

    def added(self, dropped: int) -> int:
        """Merged tokens made of `dropped` ones: from one `dropped` to the next the same, or one more."""
        ...


@dataclass(frozen=True)
class Step:
    """A stage as the solver sees it."""

    layer: int
    """The first layer (0-based) that sees fewer tokens; 0 after vision."""
    scheduler: Schedule
    recycler: Recycle


def plan(
    stages: Sequence[Step], budget: Budget | None, *, depth: int, total: int, grids: Sequence[Grid]
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

    Raises:
        BudgetError: stages out of order or beyond `depth`, or a budget that they cannot meet.
    """
    _check_order(stages, depth)
    if not stages:
        if budget is not None and count_of(budget.value, total) < total:
            raise BudgetError(f"budget {budget}: this recipe has no stages, so it keeps all {total} vision tokens")
        return ()
    if total == 0:
        return tuple(0 for _ in stages) if budget else tuple(0 if step.scheduler.static else None for step in stages)
    if budget is None:
        return _chain(stages, total, grids)
    return _solve(stages, budget, depth, total, grids)


def check_share(stages: Sequence[Step], budget: Budget | None, *, depth: int) -> None:
    """Raise `BudgetError` if the budget is a share that the stages cannot meet: that takes a model, but no picture."""
    if budget is not None and budget.is_share and stages:
        _refuse(stages, budget, depth, _MANY)


def nominal_counts(stages: Sequence[Step], *, total: int, grids: Sequence[Grid]) -> tuple[int, ...]:
    """Counts that the schedulers keep as a rule: an expectation where they are adaptive."""
    size, counts = total, []
    for step in stages:
        want = step.scheduler.nominal(size, total=total, grids=grids)
        kept = min(size, max(1, math.floor(want + 1e-9)))
        counts.append(kept)
        size = kept + step.recycler.added(size - kept)
    return tuple(counts)


def survivors(stages: Sequence[Step], counts: Sequence[int], total: int) -> tuple[int, ...]:
    """Tokens after each stage, merged ones included, when the stages keep `counts`."""
    size, sizes = total, []
    for step, kept in zip(stages, counts, strict=True):
        if not 0 <= kept <= size:
            raise BudgetError(f"the stage before layer {step.layer} cannot keep {kept} of {size} vision tokens")
        size = kept + step.recycler.added(size - kept)
        sizes.append(size)
    return tuple(sizes)


def tokens_per_layer(stages: Sequence[Step], counts: Sequence[int], depth: int, total: int) -> list[int]:
    """Vision tokens that enter each of the `depth` layers when the stages keep `counts`."""
    _check_order(stages, depth)
    entering = [total] * depth
    for step, size in zip(stages, survivors(stages, counts, total), strict=True):
        entering[step.layer :] = [size] * (depth - step.layer)
    return entering


@dataclass(frozen=True)
class Summary:
    """One plan in every meaning that papers give to "so many tokens"."""

    total: int
    """Original vision tokens."""
    average: float
    """Tokens entering a layer, mean over all layers: budget ``average``, and the true cost."""
    average_of_outputs: float
    """Tokens leaving a layer, mean over all layers: how the SparseVLM repository counts."""
    keep: float
    """Tokens entering a layer, mean over the layers from the first place on: budget ``keep``."""
    final: int
    """Tokens after the last stage: budget ``final``."""

    def __str__(self) -> str:
        return (
            f"of {self.total} vision tokens, {self.average:.2f} enter a layer on average (leave it: "
            f"{self.average_of_outputs:.2f}), {self.keep:.2f} from the first place on, {self.final} in the end"
        )


def summary(stages: Sequence[Step], counts: Sequence[int], depth: int, total: int) -> Summary:
    """All meanings of a plan's token number together; arguments as in `tokens_per_layer`."""
    entering = tokens_per_layer(stages, counts, depth, total)
    final = survivors(stages, counts, total)[-1] if stages else total
    first = min((step.layer for step in stages), default=0)
    return Summary(
        total=total,
        average=sum(entering) / depth,
        average_of_outputs=(sum(entering[1:]) + final) / depth,
        keep=sum(entering[first:]) / (depth - first),
        final=final,
    )


def _check_order(stages: Sequence[Step], depth: int) -> None:
    layers = [step.layer for step in stages]
    if layers != sorted(layers):
        raise BudgetError(
            f"in a model of {depth} layers these stages act before layers {layers}, which is not in order"
        )
    if layers and not 0 <= layers[0] <= layers[-1] < depth:
        raise BudgetError(f"stages before layers {layers} do not fit a model of {depth} layers")


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


def _solve(stages: Sequence[Step], budget: Budget, depth: int, total: int, grids: Sequence[Grid]) -> tuple[int, ...]:
    fixed, weights, layers = _weights(stages, budget.kind, depth)
    target = count_of(budget.value, total) * layers

    def cost(wanted: Sequence[int]) -> int:
        sizes = _realise(stages, wanted, total)[1]
        return fixed * total + sum(weight * size for weight, size in zip(weights, sizes, strict=True))

    lowest = [0] * len(stages)
    if cost(lowest) > target:
        _refuse(stages, budget, depth, total)
        return _realise(stages, lowest, total)[0]  # a share that would be met if only there were more tokens
    if target >= total * layers:
        return (total,) * len(stages)
    shape = _shape(stages, total, grids)
    below, above = _bisect(lambda factor: cost(_scaled(shape, factor)) > target, 2.0 * total / min(shape))
    # The smallest factor that costs as much, so that a recipe's own cost gives back its own counts at every stage.
    best = cost(_scaled(shape, below))
    wanted = _scaled(shape, _bisect(lambda factor: cost(_scaled(shape, factor)) >= best, above)[1])
    # Several stages may step up at the same factor: take those that still fit, the earliest first.
    for index, size in enumerate(_scaled(shape, above)):
        more = [*wanted[:index], size, *wanted[index + 1 :]]
        wanted = more if cost(wanted) < cost(more) <= target else wanted
    return _realise(stages, wanted, total)[0]


def _bisect(enough: Callable[[float], bool], high: float) -> tuple[float, float]:
    """Neighbouring factors: the first is not `enough` (or 0), the second is. `enough` never turns back to False."""
    low = 0.0
    for _ in range(64):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return low, high


def _weights(stages: Sequence[Step], kind: BudgetKind, depth: int) -> tuple[int, list[int], int]:
    """Layers that count and see all tokens, layers that see what each stage left, layers in all."""
    if kind == "final":
        return 0, [0] * (len(stages) - 1) + [1], 1
    edges = [*(step.layer for step in stages), depth]
    weights = [after - before for before, after in pairwise(edges)]
    return (0, weights, depth - edges[0]) if kind == "keep" else (edges[0], weights, depth)


def _shape(stages: Sequence[Step], total: int, grids: Sequence[Grid]) -> list[float]:
    """Tokens after each stage as the schedulers would have it, real numbers above 0."""
    size, shape = total, []
    for step in stages:
        kept = min(float(size), max(1e-6, step.scheduler.nominal(size, total=total, grids=grids)))
        left = kept + step.recycler.added(size - max(1, math.floor(kept + 1e-9)))
        shape.append(min(left, float(size)))
        size = max(1, round(shape[-1]))
    return shape


def _scaled(shape: Sequence[float], factor: float) -> list[int]:
    return [math.floor(factor * size) for size in shape]


def _realise(stages: Sequence[Step], wanted: Sequence[int], total: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def _refuse(stages: Sequence[Step], budget: Budget, depth: int, total: int) -> None:
    """Raise if the stages cannot go as low as `budget` for a sample of `total` vision tokens."""
    minimum = _minimum(stages, budget.kind, depth, total)
    target: float = count_of(budget.value, total)
    reach, nearest = f"{float(minimum):.5g} … {total} of {total} vision tokens", str(math.ceil(minimum))
    if budget.is_share:
        minimum, target = _minimum(stages, budget.kind, depth, _MANY) / _MANY, budget.value
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
    sizes = _realise(stages, [0] * len(stages), total)[1]
    return Fraction(fixed * total + sum(weight * size for weight, size in zip(weights, sizes, strict=True)), layers)
