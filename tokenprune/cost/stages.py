"""`stage_rows`: what the stages of a recipe cost themselves, in multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenprune.budget import survivors
from tokenprune.cost.shape import DecoderShape
from tokenprune.parts.work import Work
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage


@dataclass(frozen=True)
class StageRow:
    """One stage's own cost."""

    name: str
    layer: int
    """The decoder layer before which it acts; 0 after vision."""
    kept: int
    tokens: int
    """Vision tokens behind it, merged ones included."""
    parts: dict[str, int]
    """Multiply-adds of each role that has any."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_rows(
    decoder: DecoderShape,
    pipeline: Pipeline,
    counts: Sequence[int],
    *,
    total: int,
    text: int,
    question: int,
    plan: Sequence[int | None] | None = None,
) -> tuple[StageRow, ...]:
    """One row for each stage of `pipeline` when they keep `counts`.

    Args:
        decoder: the language model.
        pipeline: the recipe's stages.
        counts: tokens that each stage keeps.
        total: vision tokens of the prompt.
        text: its other tokens.
        question: of these, the ones that may rate.
        plan: the counts, None where a scheduler has to find them out; all are known when left out.
    """
    steps = pipeline.steps(decoder.layers)
    before, rows = total, []
    asked: set[str | None] = set()
    sizes = survivors(steps, counts, total)
    for stage, step, planned, kept, after in zip(
        pipeline, steps, counts if plan is None else plan, counts, sizes, strict=True
    ):
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
        )
        parts = {}
        if planned != before:
            parts = _parts(stage, work, known=stage.shared_raters in asked - {None}, counted=planned is None)
            asked.add(stage.shared_raters)
        rows.append(StageRow(stage.name, step.layer, kept, after, parts))
        before = after
    return tuple(rows)


def _parts(stage: Stage, work: Work, *, known: bool, counted: bool) -> dict[str, int]:
    """Multiply-adds of each role; raters run where an earlier stage has not asked the same ones, the scheduler where no
    plan has fixed the count."""
    costs = {
        "raters": 0 if stage.raters is None or known else stage.raters.multiply_adds(work),
        "scorer": stage.scorer.multiply_adds(work),
        "scheduler": stage.scheduler.multiply_adds(work) if counted else 0,
        "sampler": stage.sampler.multiply_adds(work),
        "recycler": stage.recycler.multiply_adds(work),
    }
    return {role: cost for role, cost in costs.items() if cost}
