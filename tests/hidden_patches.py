"""The law that stages inside a vision tower are judged by: the untouched tower, in which dropped patches are hidden.

From a stage's block on, nobody sees a dropped patch. Nothing is shortened: their rows run on, seen by nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from families import build, vision_mask
from reference import Stage as Hidden
from reference import masked_reference, pruned_difference
from torch import Tensor

import tokenprune as tp
from tokenprune.core.place import Place
from tokenprune.families.anatomy import anatomy
from tokenprune.families.tower import Tower
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.stage import Stage


def inside(block: int, keep: float = 0.5, **parts: Any) -> Stage:
    parts = {"scorer": NormScorer(), "sampler": TopKSampler(), **parts}
    return Stage(place=Place("in_vision", block), scheduler=FixedScheduler(keep=keep), **parts)


def later(layer: int, keep: float) -> Stage:
    return Stage(place=layer, scheduler=FixedScheduler(keep=keep), scorer=NormScorer(), name=f"before_{layer}")


@contextmanager
def hidden_patches(tower: Tower, gone: dict[int, Tensor], bias: dict[int, Tensor] | None = None) -> Iterator[None]:
    """Eager attention of a tower in which, from each block on, patches ``[patches]`` of that block are seen by nobody.

    Nothing is dropped: their rows run on. `bias` is added to the keys, ``[patches]``.
    """
    module = sys.modules[type(tower.attentions[0]).__module__]
    original, place = module.eager_attention_forward, {id(a): i for i, a in enumerate(tower.attentions)}
    at: dict[int, int] = {}

    def masked(attention: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = place.get(id(attention))
        if block is None:
            return original(attention, query, key, value, *args, **kwargs)
        own = kwargs.pop("attention_mask") if "attention_mask" in kwargs else args[0]  # Pixtral: who shares a picture
        rows, n = key.shape[0], key.shape[2]
        start = at.get(block, 0)
        added = torch.zeros(rows, n)
        for first, dropped in gone.items():
            if block >= first:
                here = dropped[start : start + rows * (n - tower.prefix)].view(rows, -1).bool()
                added[:, tower.prefix :] = added[:, tower.prefix :].masked_fill(here, -1e30)
        for first, extra in (bias or {}).items():
            if block >= first:
                added[:, tower.prefix :] += extra[start : start + rows * (n - tower.prefix)].view(rows, -1)
        at[block] = start + rows * (n - tower.prefix)
        # Where all of a stretch are gone they see each other evenly, which nobody reads.
        mask = added[:, None, None] if own is None else own + added[:, None, None]
        return original(attention, query, key, value, mask, *args[1:], **kwargs)

    with patch.object(module, "eager_attention_forward", masked):
        yield


def gone_of(attached: Any) -> dict[int, Tensor]:
    """By block, the patches that the stages of the last run have dropped."""
    stages = attached.engine.tower.stages
    reduction = attached.engine.now.tower.runs[0].reduction
    return {block: reduction.gone[numbers[-1]][:, 0] for block, numbers in stages.at.items()}


def exact(family: str, attention: Any) -> Any:
    """A model in float64, of few decoder layers."""
    model = build(family, attention=attention, layers=4).double()
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model


def differences(model: Any, eager: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Two stages in the tower, one in the decoder behind them: how far the logits are from the reference.

    First of one whose tower and decoder hide what is gone, then of one whose decoder alone does.
    """
    stages = [inside(1, 0.8), inside(2, 0.5), later(3, 0.2)]
    if anatomy(model).adapter.tower_parts(model.base_model).last == 1:
        stages = [inside(0, 0.8), inside(1, 0.5), later(3, 0.2)]
    with tp.attach(model, tp.Pipeline(stages)) as attached:
        reduced = model(**batch).logits
        report, gone = attached.report, gone_of(attached)
    assert [stage.layer for stage in report.stages] == [None, None, 3]
    vision = vision_mask(model, batch["input_ids"])
    kept = [stage.kept for stage in report.stages]
    assert max(report.stages[0].sizes) > max(report.stages[1].sizes) > max(report.stages[2].sizes)
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    hidden = [Hidden(0, kept[1]), Hidden(3, kept[2])]
    with masked_reference(eager, vision, hidden):
        with hidden_patches(tower, gone):
            reference = eager(**batch).logits
        without = eager(**batch).logits
    compared = vision, batch["attention_mask"], kept[2]
    return pruned_difference(reduced, reference, *compared), pruned_difference(reduced, without, *compared)
