"""Stages as the solver sees them, and the tokens that a plan leaves in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from tokenprune.core.grids import Grid
from tokenprune.errors import BudgetError


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
    empties: bool = False
    """Whether it keeps no token, whatever the budget (`Scheduler.empties`)."""


def nominal_counts(stages: Sequence[Step], *, total: int, grids: Sequence[Grid]) -> tuple[int, ...]:
    """Counts that the schedulers keep as a rule: an expectation where they are adaptive."""
    size, counts = total, []
    for step in stages:
        want = step.scheduler.nominal(size, total=total, grids=grids)
        kept = 0 if step.empties else min(size, max(1, math.floor(want + 1e-9)))
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
    check_order(stages, depth)
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


def together(each: Sequence[Summary]) -> Summary:
    """The plans of several pictures, each reduced by itself, as one: all of a summary's numbers are sums of tokens."""
    return Summary(*(sum(getattr(one, field.name) for one in each) for field in fields(Summary)))


def check_order(stages: Sequence[Step], depth: int) -> None:
    """Raise `BudgetError` if the stages are out of order, or beyond `depth`."""
    layers = [step.layer for step in stages]
    if layers != sorted(layers):
        raise BudgetError(
            f"in a model of {depth} layers these stages act before layers {layers}, which is not in order"
        )
    if layers and not 0 <= layers[0] <= layers[-1] < depth:
        raise BudgetError(f"stages before layers {layers} do not fit a model of {depth} layers")
