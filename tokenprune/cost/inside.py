"""`Inside`: what the stages inside a vision tower leave of a sample, what they save there, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tokenprune.budget import Step, nominal_counts, survivors
from tokenprune.core.grids import Grid
from tokenprune.cost.shape import VisionShape
from tokenprune.errors import UnsupportedModelError
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.work import Work
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage


@dataclass(frozen=True)
class Left:
    """A scheduler of a count that is known: as later stages see one inside the tower, which counts by picture."""

    tokens: int
    static: bool = True

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        return min(size, self.tokens)

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return float(min(size, self.tokens))


@dataclass(frozen=True)
class Inside:
    """The stages of a pipeline inside the tower, on one sample."""

    steps: tuple[Step, ...]
    """As the language model sees them: in front of it, so many tokens are left of the sample, merged ones included."""
    parts: tuple[dict[str, int | None], ...]
    """Of each stage, multiply-adds of each role; None where they are not stated."""
    restores: tuple[bool, ...]
    """Whether merged patches are given back after each block, which nobody has counted."""
    saved: int
    """Multiply-adds that blocks of the tower do not run."""
    exact: bool
    """Whether counts alone tell that; attention in windows, and tiles that are cut behind the tower, depend on which
    patches are left."""


def inside_tower(vision: VisionShape, pipeline: Pipeline, total: int, grids: Sequence[Grid]) -> Inside:
    """The stages of `pipeline` inside the tower; every picture, or tile of one, is counted by itself.

    Args:
        vision: the tower.
        pipeline: the recipe's stages.
        total: vision tokens of the sample.
        grids: (T, H, W) of each of its images, in vision tokens.

    Raises:
        UnsupportedModelError: the tower has no such block, or nobody has counted such a tower.
        BudgetError: a count, and several pictures.
    """
    stages = [stage for stage in pipeline if stage.place.kind == "in_vision"]
    if not stages:
        return Inside((), (), (), 0, True)
    pictures = vision.pictures(total, grids)
    if pictures is None:
        raise UnsupportedModelError(
            f"ledger: {stages[0].name} ({stages[0].place}): what a stage inside a {type(vision).__name__} saves is not "
            "counted yet"
        )
    pipeline.check_pictures(len(pictures), 1)
    blocks = [_block(stage, vision.layers) for stage in stages]
    own = [Step(0, stage.scheduler, stage.recycler, stage.scheduler.empties) for stage in stages]
    left: list[tuple[int, ...]] = []
    costs: list[list[dict[str, int | None]]] = []
    saved, exact = 0, True
    for picture in pictures:
        whole = math.prod(picture)
        planned = pipeline.picture_plan(picture)
        counts = tuple(count for count in planned if count is not None)
        if len(counts) < len(own):
            counts, exact = nominal_counts(own, total=whole, grids=(picture,)), False
        sizes = survivors(own, counts, whole)
        left.append(sizes)
        costs.append(
            [
                _parts(stage, vision, before, kept, whole)
                for stage, before, kept in zip(stages, (whole, *sizes), counts, strict=False)
            ]
        )
        entering = [whole] * vision.layers
        for block, size in zip(blocks, sizes, strict=True):
            entering[block:] = [size] * (vision.layers - block)
        for layer, size in enumerate(entering):
            if size < whole:
                saved += vision.block(picture, layer, whole) - vision.block(picture, layer, size)
                exact = exact and vision.counts_tell(picture, layer)
    told = [vision.arriving(total, grids, sizes) for sizes in zip(*left, strict=True)]
    return Inside(
        steps=tuple(Step(0, Left(tokens), DropRecycler()) for tokens, _ in told),
        parts=tuple(_together(each) for each in zip(*costs, strict=True)),
        restores=tuple(not isinstance(stage.recycler, DropRecycler) for stage in stages),
        saved=saved,
        exact=exact and all(certain for _, certain in told),
    )


def _block(stage: Stage, layers: int) -> int:
    at = stage.place.at
    assert at is not None
    if isinstance(at, Fraction):
        return min(layers - 1, int(at * layers + Fraction(1, 2)))
    if at >= layers:
        raise UnsupportedModelError(
            f"ledger: {stage.name} ({stage.place}): block {at}, but the vision tower has {layers} blocks; "
            f"expected 0 … {layers - 1}"
        )
    return at


def _parts(stage: Stage, vision: VisionShape, before: int, kept: int, whole: int) -> dict[str, int | None]:
    """Multiply-adds of each role on one picture; nothing where all of it is kept."""
    if kept == before:
        return {}
    work = Work(
        tokens=before,
        kept=kept,
        total=whole,
        text=0,
        raters=0,
        sequence=before,
        width=vision.width,
        heads=1,
        kv_heads=1,
        head_dim=vision.width,
    )
    return {part.role: part.multiply_adds(work) for part in stage.parts}


def _together(pictures: Sequence[dict[str, int | None]]) -> dict[str, int | None]:
    summed: dict[str, int | None] = {}
    for parts in pictures:
        for role, cost in parts.items():
            before = summed.get(role, 0)
            summed[role] = None if cost is None or before is None else before + cost
    return summed
