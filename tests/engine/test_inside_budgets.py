"""Budgets of recipes that act inside the vision tower: a share of each picture, whatever its size, or its count."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from families import FAMILIES, Row, build, inputs, row_inputs, sizes
from hidden_patches import inside, later
from hypothesis import given
from hypothesis import strategies as st
from pruned import TOLERANCE
from towers import INSIDE

import tokenprune as tp
from tokenprune.cost.account import account
from tokenprune.errors import BudgetError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.shape import model_shape

KINDS = ("keep", "average", "final")
shares = st.integers(1, 10_000).map(lambda n: n / 10_000)
grids = st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30))


def left(pipeline: Any, grid: tuple[int, int, int]) -> tuple[int, ...]:
    counts = pipeline.picture_plan(grid)
    assert all(stage.recycler.added(10) == 0 for stage in pipeline), "else counts are not what is left"
    return tuple(int(count) for count in counts)


@given(st.sampled_from(INSIDE), st.sampled_from(KINDS), shares, grids)
def test_a_share_is_exact_on_every_picture(name: str, kind: str, share: float, grid: tuple[int, int, int]) -> None:
    n = math.prod(grid)
    counts = left(tp.build(tp.load_recipe(name, **{kind: share})), grid)
    expected = max(1, math.floor(Fraction(share).limit_denominator(10**9) * n))
    assert counts[-1] == expected
    assert all(1 <= count <= before for count, before in zip(counts, (n, *counts), strict=False))


@given(st.sampled_from(INSIDE), shares, shares, grids)
def test_a_larger_share_leaves_no_fewer_at_any_stage(
    name: str, one: float, other: float, grid: tuple[int, int, int]
) -> None:
    less, more = (left(tp.build(tp.load_recipe(name, keep=share)), grid) for share in sorted((one, other)))
    assert all(a <= b for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("name", INSIDE)
def test_what_the_schedulers_keep_is_what_the_same_share_keeps(name: str) -> None:
    """So a budget changes how many, and not how the stages divide it."""
    plain = left(tp.build(name), (1, 24, 24))
    assert left(tp.build(tp.load_recipe(name, keep=plain[-1] / 576)), (1, 24, 24)) == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_a_model_keeps_it_of_each_of_its_pictures(name: str, family: str) -> None:
    """Pictures of two sizes where the tower takes them; a row is its sample alone, and the ledger tells the same."""
    model = build(family)
    one, other = sizes(family)[0], sizes(family)[-1]
    batch = inputs(family, model, rows=[Row(images=(one, other)), Row(images=(other,))])
    recipe = tp.load_recipe(name, variant=plain_of(name, model), average=0.3)
    pipeline = tp.build(recipe, depth=model_shape(model).decoder.layers)
    with tp.attach(model, recipe) as attached:
        together = model(**batch).logits
        report = attached.report
        alone = [model(**row_inputs(batch, row)).logits for row in range(2)]
    vision = model_shape(model).vision
    for row, total in enumerate(report.total):
        pictures = vision.pictures(total, report.grids[row])
        expected, _ = vision.arriving(
            total, report.grids[row], [left(pipeline, picture)[-1] for picture in pictures or ()]
        )
        assert report.stages[-1].sizes[row] == expected < total
        assert (together[row, -1] - alone[row][0, -1]).abs().max() < TOLERANCE
        told = account(model_shape(model), pipeline, total=total, grids=report.grids[row], text=5)
        assert told.reduced.rows[0].vision == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_a_full_budget_is_bit_identical(name: str, family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    untouched = model(**batch).logits
    with tp.attach(model, tp.load_recipe(name, variant=plain_of(name, model), keep=1.0)):
        assert torch.equal(model(**batch).logits, untouched)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_count_is_that_of_the_only_picture(family: str) -> None:
    """Of each sample; where one has several, or tiles, nobody could share it out in the tower."""
    model = build(family)
    one, other = sizes(family)[0], sizes(family)[-1]
    recipe = tp.load_recipe("ailurus", keep=3)
    with tp.attach(model, recipe) as attached:
        if family != "llava_next":
            batch = inputs(family, model, rows=[Row(images=(one,)), Row(images=(other,), after=9)])
            model(**batch)
            assert attached.report.stages[0].sizes == (3, 3)
            model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
            assert attached.report.stages[0].sizes == (3, 3, 3, 3)
        several = inputs(family, model, rows=[Row(images=(one, other)), Row(images=(other,))])
        with pytest.raises(BudgetError, match=r"keep: 3: a count is one of all pictures.* for 2 prompts; expected a"):
            model(**several)
    pipeline = tp.build(recipe, depth=model_shape(model).decoder.layers)
    vision = model_shape(model).vision
    for many in (1, 2):
        grids = many * vision.usual()
        ask: dict[str, Any] = {"total": sum(map(math.prod, grids)), "grids": grids, "text": 5}
        if len(vision.pictures(ask["total"], grids) or ()) == 1:
            assert account(model_shape(model), pipeline, **ask).reduced.rows[0].vision == 3
        else:
            with pytest.raises(BudgetError, match="for 1 prompt; expected a share"):
                account(model_shape(model), pipeline, **ask)


def plain_of(name: str, model: Any) -> str | None:
    """The variant without biases, where the tower's attention takes none."""
    packed = anatomy(model).adapter.tower_parts(model.base_model).order != "raster"
    return "plain" if packed and "plain" in tp.load_recipe(name).variants else None


def test_what_no_picture_can_tell_is_refused_by_name() -> None:
    """Where the pipeline is made, so that nothing begins; a dense head has no layers to average over."""
    with pytest.raises(BudgetError, match=r"tome: budget flops: 0.5: what a prompt costs.*expected keep, such as keep"):
        tp.build("tome", flops=0.5)
    with pytest.raises(BudgetError, match=r"some stages act inside the vision tower.*leave the budget out"):
        tp.Pipeline([inside(1), later(2, 0.5)], budget=tp.Budget("keep", 0.5), depth=8)
    vit = anatomy(build("llava")).adapter.tower_parts(build("llava").base_model).module
    with pytest.raises(UnsupportedModelError, match="has a budget, which counts decoder layers"):
        tp.attach_vision(vit, tp.load_recipe("ailurus", keep=0.5))
