"""Whatever is typed, the answer is a recipe or an error that points inside the text; and what is valid survives."""

# ruff: noqa: E501  (lists of odd pieces)

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing.texts import GOOD, check, mutated, texts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenprune.errors import RecipeError
from tokenprune.recipe import InvalidRecipeError, Recipe, list_recipes, load_recipe, parse_recipe
from tokenprune.recipe.text.node import Source
from tokenprune.recipe.text.yaml_reader import read_yaml
from tokenprune.recipe.text.yaml_rules import Dumper

quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def try_text(text: str) -> Recipe | None:
    try:
        recipe = parse_recipe(text, path="r")
    except InvalidRecipeError as error:
        check(error, {"r": text})
        return None
    assert parse_recipe(recipe.dump()) == recipe
    return recipe


@quick
@given(texts)
@example('name: "\\UFFFFFFFF"')
@example("%YAML ².1\n---\n")
def test_any_text_gives_a_recipe_or_a_located_error(text: str) -> None:
    try_text(text)


@quick
@given(st.sampled_from(GOOD), st.randoms(use_true_random=False))
def test_any_change_to_a_good_recipe_gives_a_recipe_or_a_located_error(text: str, rng: random.Random) -> None:
    try_text(mutated(text, rng))


@quick
@given(data=st.binary(max_size=200))
def test_any_file_gives_a_recipe_or_a_located_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    try:
        load_recipe(path)
    except InvalidRecipeError as error:
        check(error, {})


paths = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            ["stages", "0", "1", "9", "-1", "²", "first", "early", "scheduler", "type", "keep", "budget", "recycler", "scorer",
             "place", "before_layer", "", "name", "extends", "variants", "version", "rows", "576", "raters", " ", "\n"]
        ),
        max_size=6,
    ).map(".".join),
)  # fmt: skip


@quick
@given(
    st.sampled_from(list_recipes()), st.lists(st.tuples(paths, st.sampled_from(["=", "=", "=", ""]), texts), max_size=3)
)
def test_any_set_gives_a_recipe_or_a_located_error(name: str, expressions: list[tuple[str, str, str]]) -> None:
    sets = ["".join(expression) for expression in expressions]
    try:
        recipe = load_recipe(name, sets=sets, keep=0.5)
    except InvalidRecipeError as error:
        check(error, {"--set": sets[0]} if len(sets) == 1 else {})
    else:
        assert parse_recipe(recipe.dump()) == recipe


@quick
@given(
    st.text(max_size=20),
    st.dictionaries(st.text(max_size=8), st.sampled_from(["../x.yaml", 3, None, "a.yaml"]), max_size=2),
)
def test_any_extends_and_variants_give_a_located_error(value: str, variants: dict[str, object]) -> None:
    text = yaml.dump({"version": 1, "extends": value, "variants": variants}, Dumper=Dumper, allow_unicode=True)
    try_text(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["1e5", "017", "0o7", "yes", "null", "~", "", "<<", "=", ".5", "-", "1_0", "12:30", "- a", "a: b", "#", "\x85", "\ufeff"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(quick, max_examples=200)
@given(plain)
def test_what_the_dumper_writes_the_reader_reads(data: Any) -> None:
    text = yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    root, problems = read_yaml(text, Source("r", ("",)))
    assert not problems
    assert root is not None
    assert json.dumps(root.plain()) == json.dumps(zero(data))


def zero(data: Any) -> Any:
    """-0.0 is read as 0.0."""
    if isinstance(data, dict):
        return {key: zero(value) for key, value in data.items()}
    if isinstance(data, list):
        return [zero(value) for value in data]
    return data + 0.0 if isinstance(data, float) else data


keep = st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True)
part_settings = {
    "raters": st.sampled_from([{"type": "last_text"}, {"type": "above_mean", "threshold": "above"}]),
    "scorer": st.fixed_dictionaries({"type": st.just("attention")}, optional={"rope": st.booleans(), "heads": st.integers(1, 9)}),
    "scheduler": keep.map(lambda value: {"type": "fixed", "keep": value})
    | st.dictionaries(st.integers(1000, 2000), st.integers(1, 1000), min_size=1, max_size=3).map(
        lambda rows: {"type": "table", "rows": rows}
    ),
}  # fmt: skip
stage = st.fixed_dictionaries(
    {"place": st.just("after_vision"), **part_settings},
    optional={
        "positions": st.sampled_from(["original", "renumber"]),
        "sampler": st.sampled_from(["top_k", {"type": "uniform"}]),
    },
)
recipes = st.fixed_dictionaries(
    {"version": st.just(1), "stages": st.lists(stage, max_size=3)},
    optional={
        "summary": st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        "differences": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=3),
        "budget": st.tuples(st.sampled_from(["keep", "average", "final"]), keep).map(lambda pair: {pair[0]: pair[1]}),
    },
)


def shuffled(data: Any, rng: random.Random) -> Any:
    if isinstance(data, dict):
        items = [(key, shuffled(value, rng)) for key, value in data.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in data] if isinstance(data, list) else data


@quick
@given(recipes, st.randoms(use_true_random=False))
def test_valid_recipes_survive_and_keep_their_fingerprint(data: dict[str, Any], rng: random.Random) -> None:
    recipe = load_recipe(data)
    assert parse_recipe(recipe.dump()) == load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(shuffled(data, rng)) == recipe
    renamed = {
        **data,
        "name": "other",
        "summary": "x",
        "stages": [{**s, "name": f"s{i}"} for i, s in enumerate(data["stages"])],
    }
    assert load_recipe(renamed).fingerprint == recipe.fingerprint
    assert (load_recipe(renamed) == recipe) is False


@quick
@given(recipes)
def test_a_split_by_extends_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    folder: Path = tmp_path_factory.getbasetemp()
    base = {key: value for key, value in data.items() if key in {"version", "stages"}}
    own = {key: value for key, value in data.items() if key != "stages"}
    (folder / "base.yaml").write_text(yaml.dump(base, Dumper=Dumper))
    (folder / "own.yaml").write_text(yaml.dump({**own, "extends": "base.yaml"}, Dumper=Dumper, allow_unicode=True))
    assert load_recipe(folder / "own.yaml").fingerprint == load_recipe(data).fingerprint


def test_errors_are_recipe_errors() -> None:
    assert issubclass(InvalidRecipeError, RecipeError)
