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
from torch import Tensor

from tokenprune.core.place import Place
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
