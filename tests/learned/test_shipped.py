"""Weights that come with the package: what a recipe names is there, or the recipe says what makes it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from families import build

import tokenprune as tp
from tokenprune.errors import TokenPruneError
from tokenprune.fitting.fresh import fresh_stages, without_weights
from tokenprune.fitting.written import learned_parts, write_weights
from tokenprune.parts.learned import Host
from tokenprune.recipe import list_learned_recipes, list_loop_recipes, load_recipe, parse_recipe, recipe_path, weights
from tokenprune.recipe.weights import digest

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "tokenprune" / "weights"
BENCHMARKS = ROOT / "benchmarks" / "learned"


SHIPPED = [*list_learned_recipes(), *list_loop_recipes()]


def names(name: str) -> list[str]:
    """Weights that a recipe names, ``file#digest``; of one that asks again, those of its variants."""
    recipe = load_recipe(name)
    parts = [part for stage in recipe.stages for part in stage.parts.values()]
    asking = [load_recipe(name, variant=variant).again for variant in recipe.variants]
    return [
        *(named for part in parts if (named := part.settings().get("weights"))),
        *(again.weights for again in asking if again is not None and again.weights is not None),
    ]


@pytest.mark.parametrize("name", list_learned_recipes())
def test_a_recipe_runs_on_no_model_that_its_weights_were_not_made_for(name: str) -> None:
    """With weights or without: another model gets the command that makes its own."""
    with pytest.raises(TokenPruneError, match="tokenprune fit"):
        tp.attach(build("llava", layers=4), name)


def test_what_recipes_name_is_what_the_script_has_logged() -> None:
    log = BENCHMARKS / "ship.json"
    told: dict[str, Any] = json.loads(log.read_text()) if log.exists() else {}
    for name in SHIPPED:
        logged = told.get(name, {"files": {}})["files"]
        assert sorted(names(name)) == sorted(f"{file}#{known}" for file, known in logged.items())
        for each in names(name):
            file, _, wanted = each.partition("#")
            assert digest((WEIGHTS / file).read_bytes()) == wanted
    shipped = {path.name for path in WEIGHTS.glob("*.safetensors")}
    assert shipped == {each.partition("#")[0] for name in SHIPPED for each in names(name)}
    assert sum((WEIGHTS / file).stat().st_size for file in shipped) < 2_000_000


def script() -> Any:
    spec = importlib.util.spec_from_file_location("ship", BENCHMARKS / "ship.py")
    assert spec is not None and spec.loader is not None
    ship = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ship)
    return ship


@pytest.mark.parametrize("name", list_loop_recipes())
def test_the_script_writes_the_name_of_a_request_and_nothing_else(name: str) -> None:
    ship, text, (old,) = script(), recipe_path(name).read_text(encoding="utf-8"), names(name)
    written = ship.named(text, load_recipe(name, variant=ship.VARIANTS[name]), {"x.safetensors": "0123456789ab"})
    assert written == text.replace(old, "x.safetensors#0123456789ab") != text


@pytest.mark.parametrize("name", list_learned_recipes())
def test_the_script_writes_names_into_the_recipe_and_nothing_else(name: str, tmp_path: Path) -> None:
    ship = script()
    text, recipe = recipe_path(name).read_text(encoding="utf-8"), load_recipe(name)
    bare = without_weights(recipe)
    parts = learned_parts(fresh_stages(recipe, Host("llava", 8, 2, 2)))
    path, files = write_weights(bare, parts, tmp_path, made_by="a test")
    digests = {file.name: digest(file.read_bytes()) for file in files}
    written = ship.named(text, recipe, digests)
    assert parse_recipe(written).fingerprint == load_recipe(path).fingerprint
    assert ship.named(written, parse_recipe(written), digests) == written, "again, over names that are there"
    assert without_weights(parse_recipe(written)).fingerprint == bare.fingerprint
    unnamed = re.sub(r", weights: [^,}]*", "", written)
    assert unnamed == re.sub(r", weights: [^,}]*", "", text), "comments and all else stay"


def test_a_recipe_elsewhere_finds_the_file_that_it_means_and_not_one_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beside a recipe go first; others of that name are passed by, as the digest tells which are meant."""
    package, own = tmp_path / "package", tmp_path / "own"
    for folder, data in ((package / "weights", b"shipped"), (own, b"own")):
        folder.mkdir(parents=True)
        (folder / "x.safetensors").write_bytes(data)
    monkeypatch.setattr(weights, "files", lambda name: package)
    for data, folder in ((b"shipped", package / "weights"), (b"own", own)):
        assert weights.find_weights(f"x.safetensors#{digest(data)}", own, "part") == folder / "x.safetensors"
