"""Every method that comes with the package: it hits its golden lines, and keeps what was planned on plain tensors."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import groupby, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parts.methods import GOLDEN, Golden, Seen

from tokenprune.budget import Budget, survivors
from tokenprune.builder import build
from tokenprune.core.attention import attention_from_qk
from tokenprune.core.grids import Grid
from tokenprune.core.signals import Signal, Signals
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.stage import Stage

GRID: Grid = (1, 24, 24)
TEXT, HEADS = 9, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(list_recipes())


@cache
def load(name: str, variant: str | None = None) -> Recipe:
    """A recipe as it runs on plain tensors: where there are no layers, what would skip their feed-forward is gone."""
    recipe = load_recipe(name, variant=variant)
    sets = [f"stages.{n}.dropped=leave" for n, stage in enumerate(recipe.stages) if stage.dropped != "leave"]
    return load_recipe(name, variant=variant, sets=sets) if sets else recipe


SETTINGS = [(name, variant) for name in NAMES for variant in (None, *load(name).variants)]
PRUNING = [(name, variant) for name, variant in SETTINGS if load(name).stages]


@cache
def built(name: str, variant: str | None = None, depth: int = 32) -> Pipeline:
    return build(load(name, variant=variant), depth=depth)


# ------------------------------------------------------------------------------------------------- the golden lines


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_a_golden_line(name: str) -> None:
    if name not in {golden.recipe for golden in GOLDEN}:
        pytest.fail(f"add to tests/parts/methods.py, checked against the paper:\n{line_of(name)}")


def line_of(name: str) -> str:
    """The golden line of a recipe as it runs now."""
    pipeline = built(name)
    counts, average = planned(pipeline, 576, GRID)
    return f'    Golden("{name}", {pipeline.layers()}, {counts}, {average}),'


def planned(pipeline: Pipeline, total: int, grid: Grid) -> tuple[tuple[int, ...] | None, float | None]:
    """Vision tokens after each stage and on average, as the pipeline plans them; None where the picture decides."""
    counts = pipeline.plan(total, (grid,))
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None, None
    return survivors(pipeline.steps(), known, total), pipeline.summary(total, (grid,)).average


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_golden_counts(golden: Golden) -> None:
    recipe = load(golden.recipe, variant=golden.variant)
    pipeline = build(recipe, depth=golden.depth, keep=golden.keep)
    assert golden.renumbers == any(stage.positions == "renumber" for stage in recipe.stages)
    assert pipeline.layers() == golden.layers
    assert planned(pipeline, golden.total, golden.grid) == (golden.after, golden.average)
    if golden.after is not None:
        assert run(pipeline, plain_tokens(pipeline, golden.grid)) == [(count, count) for count in golden.after]
    if golden.outputs is not None:
        assert pipeline.summary(golden.total, (golden.grid,)).average_of_outputs == golden.outputs


@pytest.mark.parametrize("golden", [golden for golden in GOLDEN if golden.reference], ids=str)
def test_the_first_stage_keeps_what_plain_code_of_the_paper_keeps(golden: Golden) -> None:
    """On a small picture, each prompt of a batch by itself, in float64."""
    assert golden.reference is not None
    frames = golden.grid[0]
    grid: Grid = (1, 9, 9) if frames == 1 else (frames, 3, 3)
    pipeline = build(load(golden.recipe, variant=golden.variant), depth=golden.depth, keep=golden.keep)
    first = next(iter(pipeline))
    tokens, prompts = looked_at(plain_tokens(pipeline, grid), first)
    kept = pipeline.run(first.place, tokens)[0].kept
    for row, seen in zip(kept, prompts, strict=True):
        got = row[row >= 0].tolist()
        assert got == golden.reference(seen, len(got))


# ---------------------------------------------------------------------------------------------- run, on plain tensors


def plain_tokens(pipeline: Pipeline, grid: Grid = GRID, batch: int = 2) -> Tokens:
    """Random vision tokens with every signal that the pipeline's parts declare to read, and `TEXT` text tokens."""
    generator = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1] * grid[2]
    hidden = torch.randn(batch, n, 16, generator=generator)
    text, states = torch.randn(2, batch, TEXT, 16, generator=generator)
    signals = {}
    for name in sorted({name for stage in pipeline for name in stage.reads.signals}):
        signal = name.partition("@")[0]
        heads = signal in ("layer_keys", "layer_queries", "keys")
        shape = (batch, n) if signal.endswith("attention") else (batch, n, 4, 4) if heads else (batch, n, 16)
        signals[name] = hidden if name == "embedding" else torch.rand(shape, generator=generator)
    keys = torch.randn(batch, TEXT, 4, 4, generator=generator)
    return Tokens.from_hidden(hidden, grid=grid, text=text, text_states=states, text_keys=keys, signals=signals)


def looked_at(tokens: Tokens, stage: Stage) -> tuple[Tokens, list[Seen]]:
    """`tokens` with attention of random queries and keys, the text after the vision tokens; and each prompt, plain."""
    generator = torch.Generator().manual_seed(tokens.hidden.shape[1])
    layer = next(iter(stage.reads.attention), "previous")
    batch, n = tokens.valid.shape
    q, k = 2 * torch.randn(2, batch, HEADS, n + TEXT, 8, generator=generator)
    vision = torch.arange(n).expand(batch, n).masked_fill(~tokens.valid, -1)
    rows = torch.arange(n, n + TEXT)
    attention = attention_from_qk(q, k, vision=vision, text=rows, before_rope=(k, q), layer=layer)  # type: ignore[arg-type]
    ones = torch.ones(1, 1, n + TEXT, 8)
    kernel = lambda layer: (ones[:, :, n:], ones)  # noqa: E731
    attention = dataclasses.replace(attention, kernel=kernel)
    grid = (tokens.grids[0][0][1], tokens.grids[0][0][2])
    arrays = [x.double().numpy() for x in (tokens.hidden, tokens.question.embeddings, q, k, k, q)]
    recorded = {name: tokens.signal(name).double().numpy() for name in tokens.signals.recorded}
    spoken = [x.double().numpy() for x in (tokens.question.states, tokens.question.keys)]
    prompts = [
        Seen(
            *(array[row] for array in arrays),
            grid,
            sum(grid[0] for grid in tokens.grids[0]),
            *(x[row] for x in spoken),
            signals={name: x[row] for name, x in recorded.items()},
        )
        for row in range(batch)
    ]
    return dataclasses.replace(tokens, attention=attention), prompts


def run(pipeline: Pipeline, tokens: Tokens) -> list[tuple[int, ...]]:
    """Sizes after each stage of a whole run."""
    sizes: list[tuple[int, ...]] = []
    for place, (first, *_) in groupby(pipeline, key=lambda stage: stage.place):
        results = pipeline.run(place, looked_at(tokens, first)[0])
        tokens = results[-1].tokens.check()
        sizes += [result.tokens.sizes for result in results]
    return sizes


@pytest.mark.parametrize(("name", "variant"), PRUNING)
def test_every_setting_runs_and_keeps_what_was_planned(name: str, variant: str | None) -> None:
    sizes = run(built(name, variant), plain_tokens(built(name, variant)))
    after, _ = planned(built(name, variant), 576, GRID)
    if after is None:
        assert all(1 <= n <= 576 for row in sizes for n in row)
        assert [max(row) for row in sizes] == sorted((max(row) for row in sizes), reverse=True)
    else:
        assert sizes == [(count, count) for count in after]


@pytest.mark.parametrize("name", sorted({name for name, _ in PRUNING}))
def test_degenerate_tokens_keep_the_planned_count_and_stay_finite(name: str) -> None:
    """Tokens that are all zero, all the same, or pairs of equals, in every dtype; two frames of 5 × 5."""
    pipeline = build(load(name), depth=32, keep=0.3)
    for dtype, kind in product(DTYPES, ("zero", "constant", "pairs")):
        keeps_its_plan(pipeline, (2, 5, 5), 2, dtype, kind)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted({name for name, _ in PRUNING})),
    budget=st.builds(Budget, st.sampled_from(["keep", "average", "final"]), st.floats(0.02, 1.0)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["zero", "constant", "pairs", "all differ"]),
)
def test_any_budget_keeps_its_plan_on_any_tokens(
    name: str, budget: Budget, grid: Grid, batch: int, dtype: torch.dtype, kind: str
) -> None:
    try:
        pipeline = Pipeline(list(built(name)), budget=budget, depth=32)
        pipeline.plan(math.prod(grid), (grid,))
    except BudgetError:
        assume(False)
    keeps_its_plan(pipeline, grid, batch, dtype, kind)


def keeps_its_plan(pipeline: Pipeline, grid: Grid, batch: int, dtype: torch.dtype, kind: str) -> None:
    """Finite numbers, and the counts of the plan, of tokens that are `flat`."""
    tokens, total = plain_tokens(pipeline, grid, batch), math.prod(grid)
    made = {key: flat(signal.value, kind).to(dtype) for key, signal in tokens.signals.recorded.items()}
    question = dataclasses.replace(
        tokens.question, embeddings=tokens.question.embeddings.to(dtype), states=tokens.question.states.to(dtype)
    )
    signals = Signals({key: Signal(value) for key, value in made.items()})
    hidden = flat(tokens.hidden, kind).to(dtype)
    tokens = dataclasses.replace(tokens, hidden=hidden, question=question, signals=signals)
    planned_counts = [count or 0 for count in pipeline.plan(total, (grid,))]
    sizes = iter(survivors(pipeline.steps(), planned_counts, total))
    for place, (first, *_) in groupby(pipeline, key=lambda stage: stage.place):
        for result in pipeline.run(place, looked_at(tokens, first)[0]):
            tokens = result.tokens.check()
            assert tokens.sizes == (next(sizes),) * batch
            assert tokens.hidden.isfinite().all() and tokens.hidden.dtype == dtype
            assert tokens.bias is None or tokens.bias.isfinite().all()
            assert result.scores is None or not result.scores.isnan().any()


def flat(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`x` ``[B, N, ...]`` without differences between its tokens, or with every second like the one before; or as it
    is."""
    if kind == "all differ":
        return x
    if kind == "pairs":
        return x[:, torch.arange(x.shape[1]) // 2 * 2]
    return torch.zeros_like(x) if kind == "zero" else x[:, :1].expand_as(x).contiguous()


def test_feather_on_27_by_27() -> None:
    """specs/feather_fastv_pyramiddrop.md 1.3: 218 best and 81 of the lattice, then 9 % of what is left."""
    tokens = plain_tokens(built("feather"), (1, 27, 27))
    union, deep = run(built("feather"), tokens)
    assert all(218 <= n <= 299 for n in union)
    assert list(deep) == [n * 9 // 100 for n in union]
    assert run(built("feather", "fixed"), tokens) == [(275, 275), (24, 24)]
    first = next(iter(built("feather")))
    (result,) = built("feather").run(first.place, looked_at(tokens, first)[0])
    assert result.scores is not None
    for row in range(2):
        lattice = {r * 27 + c for r in range(0, 27, 3) for c in range(0, 27, 3)}
        best = set(result.scores[row].topk(218).indices.tolist())
        assert set(result.kept[row].tolist()) - {-1} == lattice | best


def test_uniform_covers_everything() -> None:
    uniform = build("uniform", keep=36)
    (even,) = uniform.run("after_vision", plain_tokens(uniform))
    assert len({(int(i) // 24 // 4, int(i) % 24 // 4) for i in even.kept[0]}) == 36


def test_the_example_of_sparsevlm_is_right() -> None:
    """Its header promises 306, 167 and 96 tokens at a rank of 20."""
    pipeline, size, after = built("sparsevlm"), 576, []
    for stage in pipeline:
        kept = int(stage.scheduler.keep_of(torch.tensor([20]), torch.tensor([size])))  # type: ignore[operator]
        size = kept + stage.recycler.added(size - kept)
        after.append(size)
    assert after == [306, 167, 96]
    assert "306, 167 and 96" in " ".join(load_recipe("sparsevlm").differences)


def test_every_method_becomes_static_by_a_budget() -> None:
    """But those whose groups are told by the picture, or stand behind an earlier stage."""
    adaptive = {name for name in NAMES if load(name).stages and not build(name, depth=32, keep=0.3).static}
    assert adaptive == {"fastvid", "holov", "prunesid", "prunevid", "vcast", "vidcom2"}
