"""The recipes that come with the package: they load, say what they are, hit the published counts, and fit any model."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.budget import Budget, survivors
from tokenprune.builder import build
from tokenprune.core.grids import Grid
from tokenprune.errors import BudgetError, RecipeError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe, list_recipes, load_recipe, recipe_path

load = cache(load_recipe)
OURS = {"diverse-merge"}
"""Methods that nobody has published."""
NAMES = tuple(list_recipes())
METHODS = tuple(name for name in NAMES if recipe_path(name).parent.name != "baselines")
PRUNING = tuple(name for name in NAMES if load(name).stages)
PLAIN = {"cdpruner", "divprune", "fastervlm", "otprune", "skip-vision"}
"""Methods without a number in their first stage."""
EMPTYING = {"todre": ("keep", "average"), "vtw": ()}
"""Recipes with a stage that drops all: the budgets that they can be given and use up."""
SETTINGS = [(name, variant) for name in NAMES for variant in (None, *load(name).variants)]

GRID: Grid = (1, 24, 24)


@cache
def built(name: str, variant: str | None = None, depth: int = 32) -> Pipeline:
    return build(load(name, variant=variant), depth=depth)


def solved(name: str, depth: int, kind: str, value: float) -> Pipeline:
    """As with --keep, --average, --final, on shared stages: no recipe is loaded again for every picture."""
    return Pipeline(list(built(name)), budget=Budget(kind, value), depth=depth)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what they say


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
    if name in OURS:
        assert recipe.paper is None
    elif name in METHODS:
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|[A-Z]+ \d{4}", recipe.paper or "")
        assert recipe.differences
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


@pytest.mark.parametrize("name", METHODS)
def test_the_first_stage_explains_its_settings(name: str) -> None:
    """Every number of the first stage carries a comment; later stages repeat it in short."""
    text = recipe_path(name).read_text(encoding="utf-8")
    first = text.split("\nstages:\n")[1].split("\n  - name:")[0].split("\nvariants:")[0]
    lines = [line for line in first.splitlines() if re.search(r":\s*\{?[\w: ]*\d", line) and "name:" not in line]
    assert bool(lines) != (name in PLAIN)
    assert [line for line in lines if "# " not in line] == []


def test_no_two_settings_are_the_same_recipe() -> None:
    """Only sparsevlm-v1's default is one of its own variants."""
    prints: dict[str, list[tuple[str, str | None]]] = {}
    for name, variant in SETTINGS:
        prints.setdefault(load(name, variant=variant).fingerprint, []).append((name, variant))
    assert [same for same in prints.values() if len(same) > 1] == [[("sparsevlm-v1", None), ("sparsevlm-v1", "192")]]


def test_the_default_of_v15_costs_what_the_192_table_costs() -> None:
    """The budget solver, given the tables as a shape, finds the published counts again to a few tokens."""
    for name, after in (("sparsevlm-v1.5", (309, 204, 113)), ("sparsevlm-plus", (300, 200, 118))):
        pipeline = built(name)
        counts = [count or 0 for count in pipeline.plan(576, (GRID,))]
        assert survivors(pipeline.steps(), counts, 576) == pytest.approx(after, abs=2)


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
    if kind not in EMPTYING.get(name, ("keep", "average", "final")):
        return
    first = built(name).layers(depth)[0]
    # An average cannot be less than what the layers before the first place cost; 4 % is what merging leaves at least.
    least = 0.04 + (first / depth if kind == "average" else 0.0)
    value = data.draw(st.floats(min(1.0, 1.2 * least), 1.0))
    pipeline = solved(name, depth, kind, value)
    told = pipeline.summary(total, grids)
    assert getattr(told, kind) <= max(value * total, 4 + 2 * len(pipeline) + first / depth * total) + 1e-6
    counts = pipeline.plan(total, grids)
    sizes = (total, *survivors(pipeline.steps(), [count or 0 for count in counts], total))
    least_kept = 1 if name not in EMPTYING else 0
    assert all(min(least_kept, size) <= (count or 0) <= size for count, size in zip(counts, sizes, strict=False))
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


@pytest.mark.parametrize("name", [name for name in PRUNING if name != "vtw"])
def test_one_keep_costs_the_same_in_every_recipe(name: str) -> None:
    """From its first place on, each recipe spends less than one token a layer under the budget."""
    told = solved(name, 32, "keep", 128).summary(576, (GRID,))
    assert 127 < told.keep <= 128
    if name in EMPTYING:
        with pytest.raises(BudgetError, match="a stage keeps no token, so none is left; expected keep, average or"):
            solved(name, 32, "final", 32)
        return
    told = solved(name, 32, "final", 32).summary(576, (GRID,))
    assert told.final == 32


def test_a_stage_that_keeps_nothing_does_so_under_every_budget_but_a_full_one() -> None:
    assert built("vtw").plan(576, (GRID,)) == (0,)
    for kind, value in (("keep", 0.3), ("average", 0.6), ("keep", 0.9)):
        assert solved("vtw", 32, kind, value).plan(576, (GRID,)) == (0,)
        assert solved("todre", 32, kind, value).plan(576, (GRID,))[1] == 0
    assert solved("todre", 32, "keep", 1.0).plan(576, (GRID,)) == (576, 576)
    assert solved("todre", 32, "keep", 0.9).plan(576, (GRID,)) == (576, 0)  # as much as it can spend
    with pytest.raises(BudgetError, match=r"can reach 0\.5 … 1\.0; the nearest valid budget is average: 0\.5"):
        solved("vtw", 32, "average", 0.4)


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
