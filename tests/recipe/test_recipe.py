"""What a recipe holds once it is loaded: types, defaults, budgets, fingerprint, round trip, parts."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest

from tokenprune.budget import Budget
from tokenprune.core.place import Place
from tokenprune.errors import BudgetError, RecipeError
from tokenprune.recipe import Recipe, list_recipes, load_recipe, parse_recipe, recipe_path
from tokenprune.stage import Stage

FULL = """\
version: 1
name: full
summary: everything there is
paper: arXiv:2410.04417
differences: ["yes", "1e5", "a: b # c", "宽 \\U0001F600"]
budget: {average: 192}
stages:
  - name: first
    place: {before_layer: 25%}
    raters: above_mean
    scorer: {type: attention, rope: true, normalise: all, heads: 4}
    scheduler: {type: table, rows: {576: 300, 64: 20}}
    sampler: {type: uniform, stride: 3}
    recycler: {type: cluster, share: 1}
    positions: renumber
  - place: {before_layer: 12}
variants:
  64: {stages.0.scheduler.rows: {576: 64}, budget: null, stages.1.scheduler: {type: fixed, keep: 1.0}}
"""


def test_what_a_recipe_holds() -> None:
    recipe = parse_recipe(FULL)
    first, second = recipe.stages
    assert (recipe.version, recipe.name, recipe.paper) == (1, "full", "arXiv:2410.04417")
    assert recipe.differences == ("yes", "1e5", "a: b # c", "宽 😀")
    assert recipe.budget == Budget("average", 192)
    assert first.place == Place("before_layer", Fraction(1, 4))
    assert first.scheduler.settings() == {"rows": {576: 300, 64: 20}}
    assert first.recycler.settings()["share"] == 1.0
    assert isinstance(first.recycler.settings()["share"], float)
    assert (second.name, second.place, second.raters) == ("stage_1", Place("before_layer", 12), None)
    types = [second.scorer.type, second.scheduler.type, second.sampler.type, second.recycler.type]
    assert types == ["constant", "solved", "top_k", "drop"]


def test_stages_are_built_anew() -> None:
    recipe = parse_recipe(FULL)
    stages = recipe.build_stages()
    assert all(isinstance(stage, Stage) for stage in stages)
    assert (stages[0].name, stages[0].positions, stages[0].place) == ("first", "renumber", recipe.stages[0].place)
    assert repr(stages[0].scheduler) == "TableScheduler(rows={576: 300, 64: 20})"
    assert stages[1].raters is None
    assert stages[0].scorer is not recipe.build_stages()[0].scorer


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_and_their_variants_load_and_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(recipe_path(name))
    for variant in [None, *recipe.variants]:
        chosen = load_recipe(name, variant=variant)
        assert parse_recipe(chosen.dump()) == chosen
        assert load_recipe(chosen.to_dict()) == chosen
        chosen.build_stages()


def test_no_stages_is_the_identity() -> None:
    assert parse_recipe("version: 1\n").stages == ()
    assert parse_recipe("version: 1\nstages: []\n") == load_recipe({"version": 1})


def test_round_trip() -> None:
    recipe = parse_recipe(FULL)
    assert parse_recipe(recipe.dump()) == recipe
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(recipe) == recipe
    assert "    sampler: top_k\n" in recipe.dump()
    assert "budget: {average: 192}\n" in recipe.dump()


def test_copies_and_pickles() -> None:
    recipe = parse_recipe(FULL)
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert hash(copy.deepcopy(recipe)) == hash(recipe)


def test_recipes_do_not_change() -> None:
    recipe = parse_recipe(FULL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        recipe.stages[0].scorer.type = "norm"


# budget


@pytest.mark.parametrize("kind", ["keep", "average", "final"])
@pytest.mark.parametrize("value", [1, 1.0, 0.3, 64])
def test_a_budget_argument_replaces_the_budget(kind: str, value: float) -> None:
    budget = load_recipe(parse_recipe(FULL), **{kind: value}).budget  # type: ignore[arg-type]
    assert budget is not None
    assert (budget.kind, budget.value, type(budget.value)) == (kind, value, type(value))


def test_one_token_is_not_a_share_of_one() -> None:
    count, share = (parse_recipe(f"version: 1\nbudget: {{keep: {text}}}\n") for text in ("1", "1.0"))
    assert count != share
    assert count.fingerprint != share.fingerprint
    assert parse_recipe(count.dump()) == count
    assert parse_recipe(share.dump()) == share


@pytest.mark.parametrize("value", [0, 0.0, -1, 1.5, -0.1, True, float("nan"), "0.5"])
def test_budget_arguments_out_of_range(value: object) -> None:
    with pytest.raises(BudgetError, match="keep"):
        load_recipe("none", keep=value)  # type: ignore[arg-type]


def test_one_budget_at_a_time() -> None:
    with pytest.raises(BudgetError, match="one budget at a time: got keep, final"):
        load_recipe("none", keep=0.5, final=3)


def test_a_budget_argument_satisfies_solved_stages() -> None:
    recipe = {"version": 1, "stages": [{"place": "after_vision"}]}
    with pytest.raises(RecipeError, match="needs a budget"):
        load_recipe(recipe)
    assert load_recipe(recipe, keep=0.5).budget == Budget("keep", 0.5)


# fingerprint

SAME = {
    "key order": lambda text: text.replace("version: 1\nname: full\n", "name: full\nversion: 1\n"),
    "name": lambda text: text.replace("name: full", "name: other"),
    "prose": lambda text: text.replace("everything there is", "nothing"),
    "paper": lambda text: text.replace("arXiv:2410.04417", "none"),
    "stage name": lambda text: text.replace("name: first", "name: one"),
    "explicit default": lambda text: text.replace(
        "raters: above_mean", "raters: {type: above_mean, threshold: at_least}"
    ),
    "default part": lambda text: text.replace("{before_layer: 12}", "{before_layer: 12}\n    sampler: top_k"),
    "variants": lambda text: text[: text.index("variants:")],
    "whole float": lambda text: text.replace("share: 1}", "share: 1.0}"),
    "share of depth": lambda text: text.replace("25%", "8/32"),
    "order of rows": lambda text: text.replace("{576: 300, 64: 20}", "{64: 20, 576: 300}"),
    "comments": lambda text: "# hello\n" + text,
}
OTHER = {
    "budget": lambda text: text.replace("average: 192", "average: 191"),
    "kind of budget": lambda text: text.replace("average: 192", "keep: 192"),
    "place": lambda text: text.replace("25%", "26%"),
    "part": lambda text: text.replace("raters: above_mean", "raters: last_text"),
    "setting": lambda text: text.replace("heads: 4", "heads: 5"),
    "positions": lambda text: text.replace("positions: renumber", "positions: original"),
    "another stage": lambda text: text.replace(
        "variants:", "  - {place: {before_layer: 13}, scheduler: {type: fixed, keep: 9}}\nvariants:"
    ),
}


@pytest.mark.parametrize("change", SAME)
def test_fingerprint_stays(change: str) -> None:
    changed = SAME[change](FULL)
    assert changed != FULL
    assert parse_recipe(changed).fingerprint == parse_recipe(FULL).fingerprint


@pytest.mark.parametrize("change", OTHER)
def test_fingerprint_changes(change: str) -> None:
    changed = OTHER[change](FULL)
    assert changed != FULL
    assert parse_recipe(changed).fingerprint != parse_recipe(FULL).fingerprint


def test_fingerprint_is_the_same_on_every_machine() -> None:
    recipe = parse_recipe("version: 1\nbudget: {keep: 0.3}\n")
    assert recipe.fingerprint == "2ff53d87fa60"


# scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"), ("NO", "NO"), ("yes", "yes"), ("12:30:45", "12:30:45"), ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"), ("'1'", "1"), ('"1e5"', "1e5"), ("!!str 5", "5"), ("=", "="), ("25%", "25%"),
    ],
)  # fmt: skip
def test_text_that_yaml_1_1_would_convert(text: str, value: str) -> None:
    assert parse_recipe(f"version: 1\nsummary: {text}\n").summary == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), (".5", 0.5), ("5.e-1", 0.5), ("+0.5", 0.5), ("1", 1), ("0x10", 16), ("0o17", 15), ("+7", 7)],
)
def test_numbers(text: str, value: float) -> None:
    budget = parse_recipe(f"version: 1\nbudget: {{keep: {text}}}\n").budget
    assert budget is not None
    assert (budget.value, type(budget.value)) == (value, type(value))


def test_anchors_and_aliases() -> None:
    text = "version: 1\nstages:\n  - &a {place: after_vision, scheduler: &b {type: fixed, keep: 9}}\n  - *a\n"
    first, second = parse_recipe(text).stages
    assert first.scheduler == second.scheduler


def test_transformers_is_not_imported() -> None:
    code = "import sys, tokenprune.recipe as r; r.load_recipe('sparsevlm'); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipe_is_public() -> None:
    import tokenprune

    assert tokenprune.Recipe is Recipe
    assert tokenprune.load_recipe is load_recipe
