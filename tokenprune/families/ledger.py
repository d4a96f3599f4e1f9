"""`ledger`: what a recipe costs on a model, beside the untouched model, from the model's configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.builder import build
from tokenprune.core.grids import Grid, square_or_row
from tokenprune.cost.account import Ledger, account
from tokenprune.cost.presets import PRESETS
from tokenprune.cost.shape import ModelShape
from tokenprune.families.load import EMBEDDED, read_config
from tokenprune.families.shape import model_shape
from tokenprune.recipe import Recipe


def ledger(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    tokens: int | None = None,
    grids: Sequence[Grid] | None = None,
    text: int = 64,
    question: int | None = None,
    new_tokens: int = 1,
    kv_bytes: int = 2,
    matrices: int | None = None,
    keep: float | None = None,
    average: float | None = None,
    final: float | None = None,
    flops: float | None = None,
) -> Ledger:
    """Count what `recipe` saves and costs on `model`, in multiply-adds.

        print(ledger("llava-1.5-7b", "sparsevlm-v1.5", text=118))

    Args:
        model: a transformers model or configuration, a `ModelShape`, or a name: a published shape
            (`tokenprune.cost.presets`), a folder or a hub id of which only config.json is read.
        recipe: a recipe's name, path, dict or `Recipe`.
        tokens: vision tokens; those of one picture when left out.
        grids: (T, H, W) of each image, in vision tokens; one picture of `tokens` when left out.
        text: other tokens of the prompt.
        question: of these, the ones behind the first image, which may rate; all of them when left out.
        new_tokens: tokens to generate; the first comes out of the prefill.
        kv_bytes: bytes of a number in the cache.
        matrices: MLP matrices of the view "vision tokens only", 2 in some papers; the model's own when left out.
        keep: budget that replaces the recipe's, as in `build`.
        average: the same, averaged over all layers.
        final: the same, after the last stage.
        flops: budget that replaces the recipe's: a share of the untouched prefill (`Cost.prefill`).

    Raises:
        InputError: no such model, or a number out of range.
        RecipeError, BudgetError: the recipe or its budget is not valid, or does not fit the model.
        UnsupportedModelError: a model of no supported family.
    """
    shape = shape_of(model)
    if grids is None:
        grids = picture(shape, tokens)
    total = sum(math.prod(grid) for grid in grids) if tokens is None else tokens
    pipeline = build(recipe, depth=shape.decoder.layers, keep=keep, average=average, final=final, flops=flops)
    return account(
        shape,
        pipeline,
        total=total,
        grids=grids,
        text=text,
        question=question,
        new_tokens=new_tokens,
        kv_bytes=kv_bytes,
        matrices=matrices,
    )


def shape_of(model: Any) -> ModelShape:
    """The shape of whatever names or is a model; see `ledger`."""
    if isinstance(model, ModelShape):
        return model
    if not isinstance(model, str | Path):
        return model_shape(model)
    if model in PRESETS:
        return PRESETS[str(model)]
    return model_shape(read_config(str(model), also=(EMBEDDED, *PRESETS)), name=str(model))


def picture(shape: ModelShape, tokens: int | None = None) -> tuple[Grid, ...]:
    """Grids of `tokens` vision tokens, a square where that is possible; of the shape's usual picture when not given."""
    return shape.vision.usual() if tokens is None else (square_or_row(tokens),)
