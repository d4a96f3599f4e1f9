"""The budget `flops`: never exceeded, used up to the token, and solved for each prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from towers import INSIDE

import tokenprune as tp
from tokenprune.budget import Budget, plan
from tokenprune.budget.solver import _Candidates
from tokenprune.cost.account import account
from tokenprune.cost.presets import PRESETS
from tokenprune.cost.prices import PromptPrices
from tokenprune.cost.shape import ModelShape
from tokenprune.errors import BudgetError, InputError, TokenPruneError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import list_recipes, load_recipe

LLAVA = PRESETS["llava-1.5-7b"]
RECIPES = [name for name in list_recipes() if name != "none" and name not in INSIDE]


def small(layers: int, width: int) -> ModelShape:
    """A decoder so narrow that the recipe's own work is a large part of the cost."""
    heads = {"heads": 2, "kv_heads": 1, "head_dim": width // 2}
    decoder = replace(LLAVA.decoder, layers=layers, width=width, mlp=2 * width, **heads)
    vision = replace(LLAVA.vision, layers=1, width=8, mlp=8, projector=((8, width),))
    return replace(LLAVA, decoder=replace(decoder, vocab=100), vision=vision)


def pipeline_of(recipe: str, shape: ModelShape, share: float) -> Pipeline:
    return tp.build(recipe, depth=shape.decoder.layers, flops=share)


def grids_of(total: int) -> tuple[tuple[int, int, int], ...]:
    side = math.isqrt(total)
    return ((1, side, side),) if side * side == total else ((1, 1, total),)


def prices_of(pipeline: Pipeline, shape: ModelShape, total: int, text: int) -> PromptPrices:
    return PromptPrices(shape, pipeline, total, grids_of(total), text, text)


cases = st.fixed_dictionaries(
    {
        "recipe": st.sampled_from(RECIPES),
        "share": st.floats(0.2, 1.0).map(lambda x: round(x, 4)),
        "total": st.integers(1, 150),
        "text": st.integers(1, 40),
        "shape": st.builds(small, st.integers(8, 24), st.sampled_from([8, 64, 512])),
    }
)


def solve(recipe: str, share: float, total: int, text: int, shape: ModelShape) -> tuple[int, ...]:
    pipeline = pipeline_of(recipe, shape, share)
    steps, prices = pipeline.steps(), prices_of(pipeline, shape, total, text)
    depth = shape.decoder.layers
    return tuple(
        count or 0
        for count in plan(steps, pipeline.budget, depth=depth, total=total, grids=grids_of(total), prices=prices)
    )


@given(case=cases)
def test_the_largest_plan_of_all_candidates(case: dict[str, object]) -> None:
    """Against every candidate in turn: the answer fits, and whatever is larger does not. A refusal: none fits."""
    recipe, share, total, text, shape = (case[key] for key in ("recipe", "share", "total", "text", "shape"))
    pipeline = pipeline_of(recipe, shape, share)  # type: ignore[arg-type]
    prices = prices_of(pipeline, shape, total, text)  # type: ignore[arg-type]
    path = _Candidates(pipeline.steps(), total, grids_of(total), prices)  # type: ignore[arg-type]
    candidates = [(counts, prices.whole(counts)) for counts, _ in path.down_from(2 * prices.untouched)]
    assert candidates == sorted(candidates, reverse=True)
    fitting = [counts for counts, cost in candidates if cost <= share * prices.untouched * (1 + 1e-12)]  # type: ignore[operator]
    try:
        counts = solve(**case)  # type: ignore[arg-type]
    except BudgetError:
        assert not fitting
        return
    if share == 1.0:
        assert counts == (total,) * len(pipeline)
    else:
        assert counts == fitting[0]


@given(case=cases, other=st.floats(0.2, 1.0))
def test_more_flops_never_keep_less(case: dict[str, object], other: float) -> None:
    low, high = sorted([case["share"], round(other, 4)])  # type: ignore[type-var]
    try:
        fewer = solve(**{**case, "share": low})  # type: ignore[arg-type]
    except BudgetError:
        return
    more = solve(**{**case, "share": high})  # type: ignore[arg-type]
    assert all(a <= b for a, b in zip(fewer, more, strict=True))


@given(case=cases)
def test_a_refusal_names_a_budget_that_works(case: dict[str, object]) -> None:
    try:
        solve(**case)  # type: ignore[arg-type]
        return
    except BudgetError as error:
        nearest = float(str(error).rpartition(" ")[2])
    assert nearest > case["share"]  # type: ignore[operator]
    assert solve(**{**case, "share": nearest})  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "vtw"])  # it cannot spend more, or less
def test_prices_are_the_ledgers(recipe: str) -> None:
    """At the solver's own counts the ledger finds the same cost, and one token more would be too many."""
    told = tp.ledger(LLAVA, recipe, text=118, question=60, flops=0.6)
    pipeline = tp.build(recipe, depth=32)
    prices = PromptPrices(LLAVA, pipeline, 576, grids_of(576), 118, 60)
    assert prices.untouched == told.untouched.prefill
    assert prices.whole([stage.kept for stage in told.reduced.stages]) == told.reduced.prefill
    assert told.exact
    assert 0.597 < told.share("prefill") <= 0.6
    assert told.share("end_to_end") == told.share("prefill")  # one token


def test_one_stage_to_the_token() -> None:
    """FastV by hand: at 0.5, 192 of 576 tokens; 193 cost more than half."""
    half = tp.ledger(LLAVA, "fastv", text=118, flops=0.5)
    (stage,) = half.reduced.stages
    dearer = account(LLAVA, tp.build("fastv", depth=32, final=stage.kept + 1), total=576, grids=grids_of(576), text=118)
    assert 2 * half.reduced.prefill <= half.untouched.prefill < 2 * dearer.reduced.prefill


def test_all_flops_keep_everything() -> None:
    """A share of 1.0 keeps all tokens and runs nothing; just below it the recipe has to pay for itself."""
    told = tp.ledger(LLAVA, "sparsevlm-v1.5", flops=1.0)
    assert told.reduced.prefill == told.untouched.prefill
    assert tp.ledger(LLAVA, "sparsevlm-v1.5", flops=0.9999).reduced.method > 0


def test_longer_prompts_save_a_smaller_share() -> None:
    counts = [tp.ledger(LLAVA, "fastv", text=text, flops=0.6).reduced.stages[0].kept for text in (10, 100, 300)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2]


@pytest.mark.parametrize("share", [0, -0.5, 1.01, 64])
def test_a_share_and_nothing_else(share: float) -> None:
    with pytest.raises(BudgetError, match=r"flops: "):
        Budget("flops", share)


def test_refusals_say_what_is_possible() -> None:
    with pytest.raises(BudgetError) as caught:
        tp.ledger(LLAVA, "uniform", text=64, flops=0.1)
    assert str(caught.value) == (
        "budget flops: 0.1: on a prompt of 576 vision and 64 other tokens, stages that act before layer 0 can reach "
        "0.1403 … 1.0 of the untouched prefill; the nearest valid budget is flops: 0.141"
    )
    with pytest.raises(BudgetError, match="this recipe has no stages"):
        tp.ledger(LLAVA, "none", flops=0.5)
    assert tp.ledger(LLAVA, "none", flops=1.0).share("prefill") == 1.0


def test_plain_pytorch_has_no_prices() -> None:
    with pytest.raises(InputError, match=r"depends on the model and the length of the prompt; tp\.attach"):
        tp.build("fastv", depth=32, flops=0.5).plan(576, grids_of(576))
    with pytest.raises(TokenPruneError, match="needs the number of decoder layers"):
        tp.build("fastv", flops=0.5).plan(576, grids_of(576))
    stage = tp.build("fastv", depth=32).steps()
    with pytest.raises(BudgetError, match="depends on the model and the prompt"):
        plan(stage, Budget("flops", 0.5), depth=32, total=576, grids=grids_of(576))


def test_a_recipe_may_say_so() -> None:
    recipe = load_recipe({**load_recipe("fastv").to_dict(), "budget": {"flops": 0.35}})
    assert str(recipe.budget) == "flops: 0.35"
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe("fastv", flops=0.35).fingerprint == recipe.fingerprint


def test_no_vision_tokens_need_no_prices() -> None:
    assert tp.build("pyramiddrop", depth=32, flops=0.5).plan(0, ()) == (0, 0, 0)


def test_equal_counts_are_one_candidate() -> None:
    pipeline = pipeline_of("pyramiddrop", LLAVA, 0.5)
    path = _Candidates(pipeline.steps(), 40, grids_of(40), prices_of(pipeline, LLAVA, 40, 5))
    found = [counts for counts, _ in path.down_from(10**18)]
    assert len(found) == len(set(found))
    assert found[-1] == (1, 1, 1)
    assert all(sum(abs(x - y) for x, y in zip(a, b, strict=True)) == 1 for a, b in product(found[:1], found[1:2]))


class Bumpy:
    """A stage whose own work is dear unless it keeps many: 3 tokens of 10 cost 90, 8 cost 80."""

    untouched = 100

    def model(self, sizes: Sequence[int]) -> int:
        return 10 * sizes[0]

    def whole(self, counts: Sequence[int]) -> int:
        return self.model(counts) + (60 if 3 <= counts[0] <= 7 else 0)


@pytest.mark.parametrize(("share", "kept"), [(0.2, 2), (0.8, 8), (0.89, 8), (0.9, 9), (0.3, 2), (0.79, 2)])
def test_a_dearer_plan_may_come_before_a_cheaper_one(share: float, kept: int) -> None:
    """The last plan that fits, though smaller ones do not."""
    (step,) = tp.build("uniform", depth=4, keep=0.5).steps()
    budget = Budget("flops", share)
    assert plan([step], budget, depth=4, total=10, grids=((1, 1, 10),), prices=Bumpy()) == (kept,)
