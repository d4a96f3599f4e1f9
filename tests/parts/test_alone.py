"""What a recipe keeps of a sample does not depend on its batch, even where rounding could decide between equals."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import strategies
import torch
from fuzzing.recipes import attention_at, with_signals
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import list_recipes, load_recipe

NAMES = [name for name in list_recipes() if name != "none"]


def a_sample(rng: Random) -> strategies.Sample:
    """Of one to three frames of any shape: tokens that are all equal, or pairs of equals, of any length."""
    one = strategies.sample(
        (rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 6)), texts=rng.randint(2, 5), seed=rng.randint(0, 9999)
    )
    same = torch.zeros(one.total, dtype=torch.int64) if rng.random() < 0.7 else torch.arange(one.total) // 2 * 2
    return replace(one, hidden=one.hidden[same] * rng.choice([1.0, 1.0, 30.0]))


@torch.no_grad()
def left(pipeline: Pipeline, tokens: Tokens) -> Tokens:
    """What all stages leave."""
    tokens = strategies.with_tower(tokens, {name for one in pipeline for name in one.reads.tower})
    plans = [pipeline.plan(total, grids) for total, grids in zip(tokens.total, tokens.grids, strict=True)]
    whole, tokens = tokens.attention, with_signals(tokens, pipeline)
    for index, one in enumerate(pipeline):
        counts = tuple(plan[index] or 0 for plan in plans)
        tokens = one(replace(tokens, attention=attention_at(tokens, whole)), counts).tokens
    return tokens


def of_row(x: Tensor, tokens: Tokens, row: int) -> Tensor:
    return x[row, tokens.valid[row]].float()


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("name", NAMES)
def test_equal_tokens_are_kept_as_in_the_sample_alone(name: str) -> None:
    rng = Random(f"{name} 6")  # a seed at which STAR, TopV and DART once did depend on it
    for _ in range(8):
        samples, dtype = [a_sample(rng) for _ in range(3)], rng.choice([torch.float32, torch.bfloat16, torch.float16])
        budget = Budget(rng.choice(["keep", "average"]), rng.uniform(0.15, 0.95))
        try:
            pipeline = Pipeline(load_recipe(name).build_stages(), budget=budget, depth=32)
            together = left(pipeline, strategies.collate(samples, dtype=dtype, extra=rng.randint(0, 2)))
        except BudgetError:
            continue
        for row, one in enumerate(samples):
            alone = left(pipeline, strategies.collate([one], dtype=dtype))
            assert torch.equal(of_row(together.origin, together, row), of_row(alone.origin, alone, 0))
            states, own = of_row(together.hidden, together, row), of_row(alone.hidden, alone, 0)
            assert torch.allclose(states, own, rtol=1e-5, atol=1e-5)
