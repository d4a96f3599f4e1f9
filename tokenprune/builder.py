"""`build`: a recipe becomes a `Pipeline`, for a VLM of your own in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.pipeline import Pipeline, PricesOf
from tokenprune.recipe import Recipe, load_recipe


def build(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    depth: int | None = None,
    keep: float | None = None,
    average: float | None = None,
    final: float | None = None,
    flops: float | None = None,
    prices: PricesOf | None = None,
) -> Pipeline:
    """The stages of a recipe at their places, as one module without weights of its own.

        pipeline = build("feather", depth=32, keep=0.25)
        tokens = pipeline["before_layer: 8"](tokens)

    Args:
        recipe: a recipe's name, path, dict or `Recipe`.
        depth: decoder layers of the model; may be left out where no place is a share of the depth and no budget is an
            average over several places.
        keep: budget that replaces the recipe's: vision tokens per layer from the recipe's first place on, a share
            (float) or a count (int) of each sample's original ones.
        average: the same, averaged over all layers.
        final: the same, after the last stage.
        flops: budget that replaces the recipe's: a share of the multiply-adds of the untouched prefill. To solve it
            takes a model and a prompt: see `attach` and `ledger`.
        prices: of prompts on the model, for a budget ``flops``.

    Raises:
        RecipeError: the recipe is not valid, or does not fit the depth.
        BudgetError: a budget out of range, or more than one.
    """
    loaded = load_recipe(recipe, keep=keep, average=average, final=final, flops=flops)
    return Pipeline(
        loaded.build_stages(),
        budget=loaded.budget,
        depth=depth,
        name=loaded.name,
        prices=prices,
        pictures=loaded.pictures,
    )
