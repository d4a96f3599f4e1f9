"""Pipelines on plain tensors: places, plans, published counts for real, and nothing remembered between calls."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.core.attention import RaterAttention, attention_from_qk
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, InputError, RecipeError
from tokenprune.parts.raters.text import AboveMeanRaters, LastTextRaters
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler, UnionSampler
from tokenprune.parts.schedulers.base import Scheduler
from tokenprune.parts.schedulers.fixed import FixedScheduler, PyramidScheduler, SolvedScheduler, TableScheduler
from tokenprune.parts.schedulers.lattice import LatticeScheduler
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.parts.scorers.baseline import RandomScorer
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage

TEXT = 11


def stage(at: int | Fraction | None, scheduler: Scheduler, recycler: Recycler | None = None, **parts: Any) -> Stage:
    return Stage(
        place=Place("after_vision") if at is None else Place("before_layer", at),
        scheduler=scheduler,
        scorer=parts.pop("scorer", RandomScorer()),
        sampler=parts.pop("sampler", TopKSampler()),
        recycler=recycler or DropRecycler(),
        **parts,
    )


def attention(tokens: Tokens) -> RaterAttention:
    """Random queries and keys of 4 heads, vision tokens before the text, made anew for the tokens at hand."""
    generator = torch.Generator().manual_seed(tokens.hidden.shape[1])
    n = tokens.hidden.shape[1]
    q, k = torch.randn(2, tokens.hidden.shape[0], 4, n + TEXT, 8, generator=generator)
    return attention_from_qk(q, k, vision=torch.arange(n), text=torch.arange(n, n + TEXT), before_rope=(k, q))


def tokens_of(n: int, *, batch: int = 2, grid: tuple[int, int] | None = None) -> Tokens:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(batch, n, 8, generator=generator)
    return Tokens.from_hidden(hidden, grid=grid, text=torch.randn(batch, TEXT, 8, generator=generator))


def run_all(pipeline: Pipeline, tokens: Tokens, places: Sequence[str | int]) -> list[Tokens]:
    """The tokens after each place, with attention of their own at each."""
    after = []
    for place in places:
        tokens = Tokens(**{**vars(tokens), "attention": attention(tokens)})
        tokens = pipeline[place](tokens).check()
        after.append(tokens)
    return after


# ------------------------------------------------------------------------------------------- published counts for real


@pytest.mark.parametrize(
    ("keeps", "after"),
    [
        ((300, 200, 110), (309, 204, 113)),
        ((303, 110, 36), (312, 117, 39)),
        ((238, 48, 26), (249, 55, 27)),
        ((66, 30, 17), (82, 32, 18)),
    ],
)
def test_sparsevlm_v15(keeps: tuple[int, ...], after: tuple[int, ...]) -> None:
    pipeline = Pipeline(
        [
            stage(
                Fraction(at, 32),
                TableScheduler(rows={576: keep}),
                ClusterRecycler(),
                raters=AboveMeanRaters(),
                scorer=AttentionScorer(),
            )
            for at, keep in zip((3, 7, 16), keeps, strict=True)
        ],
        depth=32,
    )
    assert pipeline.static
    assert pipeline.layers() == (3, 7, 16)
    assert pipeline.layers(64) == (6, 14, 32)
    assert pipeline.plan(576, ((1, 24, 24),)) == keeps
    assert [tokens.sizes for tokens in run_all(pipeline, tokens_of(576), (3, 7, 16))] == [(m, m) for m in after]


def test_feather_on_27_by_27() -> None:
    """218 by score and 81 on the lattice make 218 … 299, of which 9 % stay: specs/feather_fastv_pyramiddrop.md 1.3."""
    last: dict[str, Any] = {"raters": LastTextRaters(), "scorer": AttentionScorer(rope=False, normalise="vision")}
    for size in ("exact", "fixed"):
        lattice = LatticeScheduler(stride=3, keep=0.3, size=size)
        pipeline = Pipeline(
            [
                stage(Fraction(1, 4), lattice, sampler=UnionSampler(stride=3), **last),
                stage(Fraction(1, 2), PyramidScheduler(keep=0.09), **last),
            ],
            depth=32,
        )
        first, second = run_all(pipeline, tokens_of(729), (8, 16))
        assert pipeline.static == (size == "fixed")
        for union, final in zip(first.sizes, second.sizes, strict=True):
            assert union == 275 if size == "fixed" else 218 <= union <= 299
            assert final == union * 9 // 100
        at = first.cell[first.valid]
        assert int(((at[:, 1:] % 3) == 0).all(-1).sum()) >= 2 * 81


def test_pyramid_chains_floors() -> None:
    pipeline = Pipeline([stage(at, PyramidScheduler(keep=0.5)) for at in (8, 16, 24)], depth=32)
    assert pipeline.plan(577, ((1, 1, 577),)) == (288, 144, 72)
    assert pipeline.summary(576, ((1, 24, 24),)).average == 270
    assert [tokens.sizes[0] for tokens in run_all(pipeline, tokens_of(576), (8, 16, 24))] == [288, 144, 72]


def test_adaptive_counts_come_from_the_data_unless_a_budget_fixes_them() -> None:
    def pipeline(budget: Budget | None) -> Pipeline:
        rank = RankRatioScheduler(rule="delete", scale=0.5, energy=0.9)
        parts: dict[str, Any] = {"raters": AboveMeanRaters(), "scorer": AttentionScorer()}
        return Pipeline([stage(at, rank, **parts) for at in (2, 5)], budget=budget, depth=8)

    adaptive, fixed = pipeline(None), pipeline(Budget("keep", 30))
    assert (adaptive.static, fixed.static) == (False, True)
    assert adaptive.plan(100, ((1, 10, 10),)) == (None, None)
    with pytest.raises(InputError, match="give it a budget"):
        adaptive.summary(100, ((1, 10, 10),))
    first, second = run_all(adaptive, tokens_of(100), (2, 5))
    assert all(50 <= size < 70 for size in first.sizes)
    assert all(b < a for a, b in zip(first.sizes, second.sizes, strict=True))
    assert run_all(fixed, tokens_of(100), (2, 5))[1].sizes == (fixed.plan(100, ((1, 10, 10),))[1],) * 2


def test_a_plan_is_little_work_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made anew for prompts of another shape, while the device waits; its search asks a recycler thousands of
    times."""
    made = []
    limit = Fraction.limit_denominator
    stages = [stage(Fraction(at, 32), SolvedScheduler(), ClusterRecycler()) for at in (3, 7, 16)]
    pipeline = Pipeline(stages, budget=Budget("keep", 192), depth=32)
    monkeypatch.setattr(Fraction, "limit_denominator", lambda *args: made.append(args) or limit(*args))
    pipeline.plan(576, ((1, 24, 24),))
    assert len(made) < 10


@given(
    n=st.integers(0, 60),
    kind=st.sampled_from(["keep", "average", "final"]),
    value=st.one_of(st.integers(1, 60), st.floats(0.1, 1.0)),
    recycle=st.booleans(),
)
def test_what_runs_is_what_was_planned(n: int, kind: str, value: float, recycle: bool) -> None:
    budget = Budget(kind, value)  # type: ignore[arg-type]
    recycler = ClusterRecycler() if recycle else DropRecycler()
    shares = ((0, 0.9), (3, 0.6), (3, 0.5), (6, 0.2))
    stages = [stage(at or None, SolvedScheduler(share=share), recycler) for at, share in shares]
    pipeline = Pipeline(stages, budget=budget, depth=8)
    try:
        told = pipeline.summary(n, ((1, 1, n),))
    except BudgetError:
        return
    after = run_all(pipeline, tokens_of(n, grid=(1, n)), ("after_vision", "before_layer: 3", 6))
    assert after[-1].sizes == (told.final,) * 2
    entering = [after[0].sizes[0]] * 3 + [after[1].sizes[0]] * 3 + [after[2].sizes[0]] * 2
    assert sum(entering) / 8 == told.average


# ---------------------------------------------------------------------------------------------------- how it is used


def two_places() -> Pipeline:
    stages = [stage(None, FixedScheduler(keep=0.5)), stage(Fraction(1, 4), FixedScheduler(keep=0.25))]
    return Pipeline(stages, depth=8, name="two")


def test_places_may_be_written_in_every_way() -> None:
    pipeline, tokens = two_places(), tokens_of(16)
    halved = pipeline["after_vision"](tokens)
    assert halved.sizes == (8, 8)
    for key in (2, "before_layer: 2", "before_layer:2 ", "before_layer: 1/4", Place("before_layer", Fraction(1, 4))):
        assert pipeline[key](halved).sizes == (4, 4)
    assert pipeline[Place("after_vision")](tokens).sizes == (8, 8)


def test_a_place_without_stages_lists_those_that_have_some() -> None:
    pipeline = two_places()
    message = r"two: no stage acts at 'before_layer: 7'.*; expected one of: after_vision, before_layer: 2"
    with pytest.raises(InputError, match=message):
        pipeline[7]
    with pytest.raises(InputError, match=r"'after_visoin' \(did you mean 'after_vision'\?\)"):
        pipeline.run("after_visoin", tokens_of(16))
    with pytest.raises(InputError, match="expected one of: none"):
        Pipeline([])["after_vision"]


def test_run_tells_what_each_stage_kept() -> None:
    pipeline = Pipeline([stage(None, FixedScheduler(keep=keep)) for keep in (8, 3)])
    results = pipeline.run("after_vision", tokens_of(16))
    assert [result.kept.shape[1] for result in results] == [8, 3]
    assert all(
        set(late.tolist()) <= set(early.tolist()) for early, late in zip(*(r.kept for r in results), strict=True)
    )


def test_places_out_of_order_are_refused() -> None:
    with pytest.raises(InputError, match=r"stage 1 \(before_layer: 1/4\) expects 8 vision tokens of sample 0, got 16"):
        two_places()[2](tokens_of(16))
    pipeline, tokens = two_places(), tokens_of(16)
    with pytest.raises(InputError, match=r"stage 0 \(after_vision\) expects 16 vision tokens of sample 0, got 8"):
        pipeline["after_vision"](pipeline["after_vision"](tokens))


def test_samples_of_a_batch_have_counts_of_their_own() -> None:
    """Different sizes and grids in one batch: each row is as if it were alone."""
    whole = tokens_of(16)
    index = torch.stack([torch.arange(16), torch.cat([torch.arange(9), torch.full((7,), -1)])])
    ragged = whole.take(index, (16, 9))
    fields = {**vars(ragged), "total": (16, 9), "grids": (((1, 4, 4),), ((1, 2, 2), (1, 1, 5)))}
    pipeline = Pipeline(
        [stage(None, SolvedScheduler()), stage(3, SolvedScheduler(share=0.5))], budget=Budget("final", 0.25)
    )
    after = pipeline[3](pipeline["after_vision"](Tokens(**fields).check())).check()
    assert after.sizes == (4, 2)
    assert pipeline.plan(9, ((1, 2, 2), (1, 1, 5)))[1] == 2


def test_no_vision_tokens() -> None:
    pipeline = two_places()
    assert pipeline.plan(0, ()) == (0, 0)
    assert pipeline[2](pipeline["after_vision"](tokens_of(0, grid=(1, 0)))).sizes == (0, 0)


def test_the_depth_is_asked_for_only_where_it_matters() -> None:
    def pipeline(places: Sequence[int | Fraction | None], budget: Budget | None) -> Pipeline:
        return Pipeline([stage(at, SolvedScheduler()) for at in places], budget=budget)

    assert pipeline([None], Budget("keep", 4)).plan(16, ((1, 4, 4),)) == (4,)
    assert pipeline([None, None], Budget("keep", 4)).plan(16, ((1, 4, 4),)) == (4, 4)
    assert pipeline([2, 6], Budget("final", 4)).plan(16, ((1, 4, 4),)) == (4, 4)
    for places, budget in (
        ([2, 6], Budget("keep", 4)),
        ([2], Budget("average", 0.5)),
        ([Fraction(1, 4)], Budget("final", 4)),
    ):
        with pytest.raises(InputError, match=r"build\(recipe, depth=32\)"):
            pipeline(places, budget).plan(16, ((1, 4, 4),))
        assert pipeline(places, budget).plan(16, ((1, 4, 4),), depth=8)


def test_a_depth_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="the model has 8 layers"):
        Pipeline([stage(16, FixedScheduler(keep=0.5))], depth=8)


def test_places_out_of_order_in_this_model_are_refused_at_once() -> None:
    """A layer number and a share of the depth compare only in a model."""
    stages = [stage(3, FixedScheduler(keep=0.5)), stage(Fraction(1, 4), FixedScheduler(keep=0.25))]
    assert Pipeline(stages, depth=16).layers() == (3, 4)
    with pytest.raises(RecipeError, match=r"two: does not fit a model of 8 layers: it acts before layers \[3, 2\]"):
        Pipeline(stages, depth=8, name="two")
    with pytest.raises(RecipeError, match="does not fit a model of 1 layers"):
        Pipeline([stage(Fraction(1, 4), FixedScheduler(keep=0.5))], depth=1)


def test_a_share_out_of_reach_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match=r"before layer 6 of 8 can reach 0\.75 … 1\.0"):
        Pipeline([stage(6, SolvedScheduler())], budget=Budget("average", 0.5), depth=8)


def test_solved_without_a_budget_says_what_to_do() -> None:
    with pytest.raises(BudgetError, match=r"budget: \{keep"):
        Pipeline([stage(None, SolvedScheduler())]).plan(16, ((1, 4, 4),))


def test_plans_are_worked_out_once_and_calls_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline([stage(2, SolvedScheduler())], budget=Budget("average", 0.5), depth=8)
    asked: list[int] = []
    nominal = SolvedScheduler.nominal

    def counting(self: SolvedScheduler, size: int, **rest: Any) -> float:
        asked.append(size)
        return nominal(self, size, **rest)

    monkeypatch.setattr(SolvedScheduler, "nominal", counting)
    tokens = tokens_of(64)
    first, second = pipeline[2](tokens), pipeline[2](tokens)
    assert len(asked) == 1
    assert torch.equal(first.hidden, second.hidden)
    assert not list(pipeline.buffers())
    assert pipeline.state_dict() == {}


def test_compiled_plans_are_constants_one_graph_a_shape() -> None:
    pipeline = Pipeline([stage(2, SolvedScheduler())], budget=Budget("average", 0.5), depth=8)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=False, backend=backend)
    def first_tokens(hidden: Tensor) -> Tensor:
        (count,) = pipeline.plan(hidden.shape[1], ((1, 1, hidden.shape[1]),), 8)
        assert count is not None
        return hidden[:, :count] + 1

    for n in (64, 100, 64, 100, 64):
        hidden = torch.randn(1, n, 4)
        assert first_tokens(hidden).shape[1] == pipeline.plan(n, ((1, 1, n),))[0]
    assert len(graphs) == 2


def test_repr_shows_the_parts_and_stages_are_iterable() -> None:
    pipeline = two_places()
    assert "FixedScheduler(keep=0.5)" in repr(pipeline)
    assert [type(item) for item in pipeline] == [Stage, Stage]
    assert len(pipeline) == 2
