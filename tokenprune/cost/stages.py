"""`stage_costs`: what the stages of a recipe cost themselves, in multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from tokenprune.budget import Step, survivors
from tokenprune.core.grids import Grid, pictures_of
from tokenprune.cost.inside import Inside
from tokenprune.cost.shape import DecoderShape, ModelShape
from tokenprune.cost.tower_signals import signal_cost
from tokenprune.parts.work import Work
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage

TOWER = "tower"
"""Stands among the roles of a stage for the signals of the vision tower that it is the first to read."""


@dataclass(frozen=True)
class StageCost:
    """One stage's own cost."""

    name: str
    layer: int
    """The decoder layer before which it acts; 0 after vision."""
    kept: int
    tokens: int
    """Vision tokens behind it, merged ones included."""
    parts: dict[str, int]
    """Multiply-adds of each role that has any."""
    unstated: tuple[str, ...] = ()
    """Parts that do not state what they cost (`Part.multiply_adds` gives None), such as ``sampler 'mine'``."""

    @property
    def total(self) -> int:
        """What is stated; more in truth where something is `unstated`."""
        return sum(self.parts.values())


def stage_costs(
    shape: ModelShape,
    pipeline: Pipeline,
    counts: Sequence[int],
    *,
    total: int,
    grids: Sequence[Grid],
    text: int,
    question: int,
    plan: Sequence[int | None] | None = None,
    inside: Inside | None = None,
) -> tuple[StageCost, ...]:
    """What each stage of `pipeline` costs itself when they keep `counts`: nothing where the plan is to keep all.

    Args:
        shape: of the model.
        pipeline: the recipe's stages.
        counts: tokens that each stage keeps.
        total: vision tokens of the prompt.
        grids: (T, H, W) of each of its images.
        text: its other tokens.
        question: of these, the ones that may rate.
        plan: the counts, None where a scheduler has to find them out; all are known when left out.
        inside: those of its stages that act in the vision tower; there are none when left out.
    """
    alone = pictures_of(grids) if pipeline.apart else ()
    if len(alone) > 1:
        return _apart(shape, pipeline, alone, text=text, question=question)
    decoder = shape.decoder
    steps = steps_behind(pipeline, decoder.layers, inside)
    within = () if inside is None else tuple(zip(inside.parts, inside.restores, strict=True))
    before, costs = total, []
    entering: list[int] = []  # vision tokens of each layer below the stage at hand
    asked: set[str | None] = set()
    recorded: set[str] = set()
    sizes = survivors(steps, counts, total)
    for number, (stage, step, planned, kept, after) in enumerate(
        zip(pipeline, steps, counts if plan is None else plan, counts, sizes, strict=True)
    ):
        entering += [before] * (step.layer - len(entering))
        work = Work(
            tokens=before,
            kept=kept,
            total=total,
            text=question,
            raters=question if stage.raters is None else min(question, stage.raters.most or question),
            sequence=before + text,
            width=decoder.width,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            tower_width=shape.vision.width,
            projected=shape.vision.projected(1) if shape.vision.one_by_one else 0,
            glimpse=_glimpse(decoder, [n + text for n in entering]) if stage.reads.glimpse else 0,
        )
        parts: dict[str, int | None] = {}
        if number < len(within):
            parts = within[number][0]
        elif planned != before:
            parts = _parts(stage, work, known=stage.shared_raters in asked - {None}, counted=planned is None)
            asked.add(stage.shared_raters)
            new = sorted(stage.reads.tower - recorded)  # type: ignore[operator]
            recorded.update(new)
            if new:
                parts[TOWER] = _together([signal_cost(shape.vision, name, total, grids) for name in new])
        stated = {role: cost for role, cost in parts.items() if cost}
        unstated = tuple(part.title for part in stage.parts if parts.get(part.role, 0) is None)
        if parts.get(TOWER, 0) is None:
            unstated += ("signals of the vision tower",)
        if number < len(within) and within[number][1]:
            unstated += ("merged patches given back after each block of the tower",)
        costs.append(StageCost(stage.name, step.layer, kept, after, stated, unstated))
        before = after
    return tuple(costs)


def _apart(
    shape: ModelShape, pipeline: Pipeline, pictures: Sequence[Sequence[Grid]], *, text: int, question: int
) -> tuple[StageCost, ...]:
    """What the stages cost that act on each of several pictures by itself: together, what they cost on each."""
    totals = [sum(map(prod, grids)) for grids in pictures]
    counts = [
        [count for count in pipeline.plan(total, grids, shape.decoder.layers) if count is not None]
        for total, grids in zip(totals, pictures, strict=True)
    ]
    each = [
        stage_costs(shape, pipeline, kept, total=total, grids=grids, text=text, question=question)
        for kept, total, grids in zip(counts, totals, pictures, strict=True)
    ]
    return tuple(
        replace(
            costs[0],
            kept=sum(cost.kept for cost in costs),
            tokens=sum(cost.tokens for cost in costs),
            parts={
                role: sum(cost.parts.get(role, 0) for cost in costs)
                for role in dict.fromkeys(chain(*(cost.parts for cost in costs)))
            },
            unstated=tuple(dict.fromkeys(chain(*(cost.unstated for cost in costs)))),
        )
        for costs in zip(*each, strict=True)
    )


def _glimpse(decoder: DecoderShape, entering: Sequence[int]) -> int:
    """One position behind the prompt: all layers below but the last, whose keys its query is compared with alone, and
    the weighted row of that. It sees itself, too.

    Args:
        decoder: the language model.
        entering: tokens of each layer below, text included; of one at least.
    """
    passed = sum(decoder.linear() + decoder.attention(1, tokens + 1) for tokens in entering[:-1])
    query, row = decoder.width * decoder.heads * decoder.head_dim, entering[-1] * decoder.heads * decoder.head_dim
    return passed + query + row + entering[-1] * decoder.heads


def steps_behind(pipeline: Pipeline, depth: int, inside: Inside | None) -> tuple[Step, ...]:
    """The stages as the solver sees them; those inside the tower by what they leave of the sample."""
    steps = pipeline.steps(depth)
    return steps if inside is None else (*inside.steps, *steps[len(inside.steps) :])


def _together(costs: Sequence[int | None]) -> int | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def _parts(stage: Stage, work: Work, *, known: bool, counted: bool) -> dict[str, int | None]:
    """Multiply-adds of each role, None where they are not stated. Raters run where an earlier stage has not asked the
    same ones, the scheduler where no plan has fixed the count."""
    skipped = {"raters": known, "scheduler": not counted}
    return {part.role: part.multiply_adds(work) for part in stage.parts if not skipped.get(part.role, False)}
