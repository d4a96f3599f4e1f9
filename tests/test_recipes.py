"""The recipes that come with the package: they load, say what they are, hit the published counts, and fit any model."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.budget import Budget, survivors
from tokenprune.builder import build
from tokenprune.core.attention import attention_from_qk
from tokenprune.core.tokens import Grid, Tokens
from tokenprune.errors import BudgetError, RecipeError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe, list_recipes, load_recipe, recipe_path

METHODS = (
    "fastv",
    "feather",
    "pyramiddrop",
    "pyramiddrop-code",
    "sparsevlm",
    "sparsevlm-plus",
    "sparsevlm-v1",
    "sparsevlm-v1.5",
)
BASELINES = ("last", "none", "random", "uniform")
NAMES = (*METHODS, *BASELINES)
PRUNING = tuple(name for name in NAMES if name != "none")
load = cache(load_recipe)
SETTINGS = [(name, variant) for name in NAMES for variant in (None, *load(name).variants)]

GRID: Grid = (1, 24, 24)
TEXT = 9


@cache
def built(name: str, variant: str | None = None, depth: int = 32) -> Pipeline:
    return build(load(name, variant=variant), depth=depth)


def solved(name: str, depth: int, kind: str, value: float) -> Pipeline:
    """As with --keep, --average, --final, on shared stages: no recipe is loaded again for every picture."""
    return Pipeline(list(built(name)), budget=Budget(kind, value), depth=depth)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what they say


def test_the_list_is_complete() -> None:
    assert sorted(list_recipes()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_introduces_itself(name: str) -> None:
    path, recipe = recipe_path(name), load(name)
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert recipe.name == path.stem
    assert len(recipe.summary) in range(10, 90)
    assert any(line.startswith("# When: ") for line in header)
    tries = [line for line in header if "tokenprune run" in line]
    assert tries
    for line in tries:
        words = re.sub(r"\s+#.*", "", line.split("tokenprune run")[1]).split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options.pop("-r") == name
        assert set(options) <= {"--keep", "--average", "--final", "--variant"}
        assert options.get("--variant") in (None, *recipe.variants)
    if name in METHODS:
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", recipe.paper or "")
        assert recipe.differences
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


@pytest.mark.parametrize("name", METHODS)
def test_the_first_stage_explains_its_settings(name: str) -> None:
    """Every number of the first stage carries a comment; later stages repeat it in short."""
    text = recipe_path(name).read_text(encoding="utf-8")
    first = text.split("\nstages:\n")[1].split("\n  - name:")[0].split("\nvariants:")[0]
    lines = [line for line in first.splitlines() if re.search(r":\s*\{?[\w: ]*\d", line) and "name:" not in line]
    assert lines
    assert [line for line in lines if "# " not in line] == []


def test_no_two_settings_are_the_same_recipe() -> None:
    """Only sparsevlm-v1's default is one of its own variants."""
    prints: dict[str, list[tuple[str, str | None]]] = {}
    for name, variant in SETTINGS:
        prints.setdefault(load(name, variant=variant).fingerprint, []).append((name, variant))
    assert [same for same in prints.values() if len(same) > 1] == [[("sparsevlm-v1", None), ("sparsevlm-v1", "192")]]


def test_names_keep_their_promise_about_positions() -> None:
    renumbered = {name for name in NAMES for stage in load(name).stages if stage.positions == "renumber"}
    assert renumbered == {"sparsevlm-v1", "sparsevlm-v1.5", "pyramiddrop-code"}


# ----------------------------------------------------------------------------------------------- published counts


@pytest.mark.parametrize(
    ("name", "variant", "after", "outputs", "inputs"),
    [
        ("sparsevlm-v1.5", "192", (309, 204, 113), 192.03125, 206.5),
        ("sparsevlm-v1.5", "128", (312, 117, 39), 128.625, 145.40625),
        ("sparsevlm-v1.5", "96", (249, 55, 27), 96.9375, 114.09375),
        ("sparsevlm-v1.5", "64", (82, 32, 18), 64.8125, 82.25),
        ("sparsevlm-plus", "192", (300, 200, 118), 192.4375, 206.75),
        ("sparsevlm-plus", "128", (238, 108, 60), 128.0, 144.125),
        ("sparsevlm-plus", "96", (246, 54, 28), 96.8125, 113.9375),
        ("sparsevlm-plus", "64", (66, 34, 20), 64.4375, 81.8125),
        ("pyramiddrop", None, (288, 144, 72), 254.25, 270.0),
        ("pyramiddrop", "64", (109, 20, 3), 45.03125, 62.9375),
        ("pyramiddrop-code", None, (288, 144, 72), 254.25, 270.0),
        ("fastv", None, (288,), 297.0, 306.0),
        ("fastv", "k3-r75", (144,), 171.0, 184.5),
    ],
)
def test_published_counts(
    name: str, variant: str | None, after: tuple[int, ...], outputs: float, inputs: float
) -> None:
    pipeline = built(name, variant)
    counts = pipeline.plan(576, (GRID,))
    assert survivors(pipeline.steps(), [count or 0 for count in counts], 576) == after
    told = pipeline.summary(576, (GRID,))
    assert (told.average_of_outputs, told.average) == (outputs, inputs)


def test_places_in_models_of_other_depths() -> None:
    assert built("sparsevlm-v1.5").layers() == (3, 7, 16)
    assert built("sparsevlm-v1").layers() == (3, 7, 16, 20)
    assert built("feather").layers() == (8, 16)
    assert built("fastv").layers() == (2,)
    assert built("pyramiddrop").layers() == (8, 16, 24)
    assert built("pyramiddrop", depth=28).layers() == (7, 14, 21)
    assert built("sparsevlm-v1.5", depth=28).layers() == (3, 6, 14)
    assert built("uniform").layers() == (0,)


def test_the_default_of_v15_costs_what_the_192_table_costs() -> None:
    """The budget solver, given the tables as a shape, finds the published counts again to a few tokens."""
    for name, after in (("sparsevlm-v1.5", (309, 204, 113)), ("sparsevlm-plus", (300, 200, 118))):
        pipeline = built(name)
        counts = [count or 0 for count in pipeline.plan(576, (GRID,))]
        assert survivors(pipeline.steps(), counts, 576) == pytest.approx(after, abs=2)


def test_the_example_of_sparsevlm_is_right() -> None:
    """Its header promises 306, 167 and 96 tokens at a rank of 20."""
    pipeline, size, after = built("sparsevlm"), 576, []
    for stage in pipeline:
        kept = int(stage.scheduler.keep_of(torch.tensor([20]), torch.tensor([size])))  # type: ignore[operator]
        size = kept + stage.recycler.added(size - kept)
        after.append(size)
    assert after == [306, 167, 96]
    assert "306, 167 and 96" in " ".join(load_recipe("sparsevlm").differences)


def test_static_and_adaptive() -> None:
    adaptive = {(name, variant) for name, variant in SETTINGS if not built(name, variant).static}
    assert {name for name, _ in adaptive} == {"feather", "sparsevlm", "sparsevlm-v1"}
    assert ("feather", "fixed") not in adaptive
    assert all(build(name, depth=32, keep=0.3).static for name in PRUNING)


# ---------------------------------------------------------------------------------------------- run, on plain tensors


def plain_tokens(grid: Grid = GRID, batch: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, grid[0] * grid[1] * grid[2], 16, generator=generator)
    return Tokens.from_hidden(hidden, grid=grid, text=torch.randn(batch, TEXT, 16, generator=generator))


def with_attention(tokens: Tokens, layer: str) -> Tokens:
    """Random queries and keys of 16 heads of width 8, the text after the vision tokens."""
    generator = torch.Generator().manual_seed(tokens.hidden.shape[1])
    batch, n = tokens.valid.shape
    q, k = 2 * torch.randn(2, batch, 16, n + TEXT, 8, generator=generator)
    vision = torch.arange(n).expand(batch, n).masked_fill(~tokens.valid, -1)
    rows = torch.arange(n, n + TEXT)
    attention = attention_from_qk(q, k, vision=vision, text=rows, before_rope=(k, q), layer=layer)  # type: ignore[arg-type]
    ones = torch.ones(1, 1, n + TEXT, 8)
    kernel = lambda layer: (ones[:, :, n:], ones)  # noqa: E731
    return dataclasses.replace(tokens, attention=dataclasses.replace(attention, kernel=kernel))


def run(pipeline: Pipeline, tokens: Tokens) -> list[tuple[int, ...]]:
    """Sizes after each stage of a whole run."""
    sizes: list[tuple[int, ...]] = []
    for place in dict.fromkeys(stage.place for stage in pipeline):
        asked = [layer for stage in pipeline if stage.place == place for layer in stage.scorer.reads.attention]
        tokens = with_attention(tokens, asked[0] if asked else "previous")
        results = pipeline.run(place, tokens)
        tokens = results[-1].tokens.check()
        sizes += [result.tokens.sizes for result in results]
    return sizes


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name, variant in SETTINGS if name != "none"])
def test_every_setting_runs_and_keeps_what_was_planned(name: str, variant: str | None) -> None:
    pipeline = built(name, variant)
    sizes = run(pipeline, plain_tokens())
    counts = pipeline.plan(576, (GRID,))
    if None in counts:
        assert all(1 <= n <= 576 for row in sizes for n in row)
        assert [max(row) for row in sizes] == sorted((max(row) for row in sizes), reverse=True)
    else:
        after = survivors(pipeline.steps(), [count or 0 for count in counts], 576)
        assert sizes == [(m, m) for m in after]


def test_feather_on_27_by_27() -> None:
    """specs/feather_fastv_pyramiddrop.md 1.3: 218 best and 81 of the lattice, then 9 % of what is left."""
    tokens = plain_tokens((1, 27, 27))
    union, deep = run(built("feather"), tokens)
    assert all(218 <= n <= 299 for n in union)
    assert list(deep) == [n * 9 // 100 for n in union]
    assert run(built("feather", "fixed"), tokens) == [(275, 275), (24, 24)]
    (result,) = built("feather").run(8, with_attention(tokens, "previous"))
    assert result.scores is not None
    for row in range(2):
        lattice = {r * 27 + c for r in range(0, 27, 3) for c in range(0, 27, 3)}
        best = set(result.scores[row].topk(218).indices.tolist())
        assert set(result.kept[row].tolist()) - {-1} == lattice | best


@pytest.mark.parametrize("name", ["random", "uniform", "last"])
def test_baselines_keep_a_third(name: str) -> None:
    assert run(build(name), plain_tokens()) == [(191, 191)]
    assert run(build(name, keep=64), plain_tokens()) == [(64, 64)]


def test_last_keeps_the_bottom_and_uniform_covers_everything() -> None:
    (last,) = build("last", keep=48).run("after_vision", plain_tokens())
    assert last.kept[0].tolist() == list(range(528, 576))
    (even,) = build("uniform", keep=36).run("after_vision", plain_tokens())
    assert len({(int(i) // 24 // 4, int(i) % 24 // 4) for i in even.kept[0]}) == 36


def test_none_has_nothing_to_do() -> None:
    pipeline = build("none", depth=32)
    assert len(pipeline) == 0
    assert pipeline.static
    assert pipeline.plan(576, (GRID,)) == ()
    assert pipeline.summary(576, (GRID,)).average == 576
    assert build("none", keep=1.0).plan(576, (GRID,)) == ()
    with pytest.raises(BudgetError, match="no stages"):
        build("none", keep=64).plan(576, (GRID,))


# --------------------------------------------------------------------------------------------- any model, any picture


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, tuple[Grid, ...]]:
    """Vision tokens of a sample: one to three images of any shape."""
    side = st.integers(1, 40)
    grids = tuple(draw(st.lists(st.tuples(st.integers(1, 2), side, side), min_size=0, max_size=3)))
    return sum(t * h * w for t, h, w in grids), grids


@pytest.mark.parametrize("name", PRUNING)
@settings(max_examples=settings().max_examples // 4)
@given(picture=pictures(), depth=st.integers(2, 80), kind=st.sampled_from(["keep", "average", "final"]), data=st.data())
def test_every_budget_works_with_every_depth_and_picture(
    name: str, picture: tuple[int, tuple[Grid, ...]], depth: int, kind: str, data: st.DataObject
) -> None:
    total, grids = picture
    first = built(name).layers(depth)[0]
    # An average cannot be less than what the layers before the first place cost; 4 % is what merging leaves at least.
    least = 0.04 + (first / depth if kind == "average" else 0.0)
    value = data.draw(st.floats(min(1.0, 1.2 * least), 1.0))
    pipeline = solved(name, depth, kind, value)
    told = pipeline.summary(total, grids)
    assert getattr(told, kind) <= max(value * total, 4 + 2 * len(pipeline) + first / depth * total) + 1e-6
    counts = pipeline.plan(total, grids)
    sizes = (total, *survivors(pipeline.steps(), [count or 0 for count in counts], total))
    assert all(min(1, size) <= (count or 0) <= size for count, size in zip(counts, sizes, strict=False))
    if value == 1.0:
        assert set(sizes) == {total}


@settings(max_examples=settings().max_examples // 4)
@given(depth=st.integers(2, 80), picture=pictures())
def test_every_recipe_as_it_is_fits_every_depth_and_picture(depth: int, picture: tuple[int, tuple[Grid, ...]]) -> None:
    total, grids = picture
    for name, variant in SETTINGS:
        pipeline = built(name, variant)
        layers = pipeline.layers(depth)
        assert list(layers) == sorted(layers)
        assert len(pipeline.plan(total, grids, depth)) == len(layers)


@pytest.mark.parametrize("name", PRUNING)
def test_one_keep_costs_the_same_in_every_recipe(name: str) -> None:
    """From its first place on, each recipe spends less than one token a layer under the budget."""
    told = solved(name, 32, "keep", 128).summary(576, (GRID,))
    assert 127 < told.keep <= 128
    told = solved(name, 32, "final", 32).summary(576, (GRID,))
    assert told.final == 32


# ---------------------------------------------------------------------------------------------------------- build


def test_build_takes_what_load_recipe_takes(tmp_path: Path) -> None:
    recipe = load_recipe("uniform")
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.dump(), encoding="utf-8")
    sources: list[Any] = ["uniform", path, str(path), recipe, recipe.to_dict()]
    for source in sources:
        pipeline = build(source, keep=64)
        assert pipeline.budget == Budget("keep", 64)
        assert pipeline.plan(576, (GRID,)) == (64,)
        assert pipeline.name == "uniform"
    assert isinstance(recipe, Recipe)
    assert recipe.budget == Budget("keep", 0.333)


def test_build_refuses() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'feather'"):
        build("fether")
    with pytest.raises(BudgetError, match="one budget at a time"):
        build("uniform", keep=0.5, final=0.5)
    with pytest.raises(RecipeError, match="the model has 4 layers"):
        build(
            {"version": 1, "stages": [{"place": {"before_layer": 7}, "scheduler": {"type": "fixed", "keep": 0.5}}]},
            depth=4,
        )


def test_shares_of_the_depth_are_exact() -> None:
    assert load_recipe("sparsevlm").stages[0].place.at == Fraction(3, 32)
