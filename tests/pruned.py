"""What the engine tests share: run a model with a recipe on, and the masked reference of what the recipe did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from families import vision_mask
from reference import Stage, generate_logits, masked_reference
from torch import Tensor

import tokenprune as tp
from tokenprune.core.report import Report
from tokenprune.parts.recyclers.base import Recycler

TOLERANCE = 1e-5


@contextmanager
def merged_states(attached: tp.Attached) -> Iterator[list[Tensor]]:
    """The hidden states ``[B, M, D]`` that each recycler puts into its anchors' slots, in order of the stages."""
    states: list[Tensor] = []

    def note(recycler: Recycler, args: tuple[Any, ...], output: Any) -> None:
        before, (after, merged) = args[0], output
        origin = before.origin.gather(1, merged.clamp(min=0))
        place = (after.origin[:, None, :] == origin[:, :, None]).int().argmax(-1)
        states.append(after.hidden.gather(1, place[..., None].expand(-1, -1, after.hidden.shape[-1])))

    handles = [s.recycler.register_forward_hook(note) for s in attached._engine.pipeline.stages]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def reference_stages(report: Report, merged: list[Tensor], rows: slice = slice(None)) -> list[Stage]:
    """What the report says that the stages did, for the masked reference; `rows` undoes beam expansion."""
    stages, states = [], iter(merged)
    for stage in report.stages:
        anchors = stage.merged[rows]
        hidden = next(states) if stage.scores is not None else None
        stages.append(Stage(stage.layer, stage.kept[rows], anchors, hidden[rows] if anchors.shape[1] else None))
    return stages


def run_both(
    model: Any, batch: Mapping[str, Any], recipe: Any, *, expand: int = 1, **options: Any
) -> tuple[float, tuple[Tensor, Tensor], Report]:
    """Generate with the recipe on, and by the masked reference: worst difference of logits, sequences, report."""
    with tp.attach(model, recipe) as attached, merged_states(attached) as merged:
        sequences, logits = generate_logits(model, batch, **options)
    stages = reference_stages(attached.report, merged[: len(attached.report.stages)], slice(None, None, expand))
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        expected, expected_logits = generate_logits(model, batch, **options)
    return worst(logits, expected_logits), (sequences, expected), attached.report


def worst(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    assert len(first) == len(second)
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(first, second, strict=True))


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
    return model(**batch, **options).logits
