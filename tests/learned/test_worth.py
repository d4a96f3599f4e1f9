"""Shipped weights answer as they were measured: `benchmarks/learned/compare.json` is of the recipes that are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.engine.weights import host_of
from tokenprune.families.anatomy import anatomy
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.written import learned_parts, write_weights
from tokenprune.recipe import list_learned_recipes, load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.evaluate import evaluate, make_conditions

MEASURED: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "learned" / "compare.json").read_text(encoding="utf-8")
)
SLACK = 1
"""Questions that another machine's rounding may cost."""


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_embedded()


def right(embedded: tuple[Any, Any], recipes: list[tp.Recipe]) -> dict[str, int]:
    """Right answers of each to the few questions whose answers were measured."""
    few = MEASURED["few"]
    conditions = make_conditions(recipes, [Budget("keep", few["keep"])], baselines=False)
    found = evaluate(*embedded, scene_cases(few["scenes"]), conditions, packed=True)
    return {outcome.condition.label: sum(outcome.right) for outcome in found.outcomes}


def test_what_was_measured_are_the_recipes_that_are_here() -> None:
    measured = MEASURED["fingerprints"]
    assert set(measured) > set(list_learned_recipes())
    assert measured == {name: load_recipe(name).fingerprint for name in measured}, (
        "run: python benchmarks/learned/compare.py"
    )
    assert {row["recipe"] for row in MEASURED["rows"]} == set(list_learned_recipes())


def test_every_shipped_recipe_answers_as_well_as_it_was_measured(embedded: tuple[Any, Any]) -> None:
    measured = MEASURED["few"]["right"]
    found = right(embedded, [load_recipe(name) for name in list_learned_recipes()])
    assert set(measured) == set(found)
    short = {name: (found[name], measured[name]) for name in found if found[name] < measured[name] - SLACK}
    assert not short, "right now, and when it was measured"


@pytest.mark.parametrize("name", ["text-conditioned", "bus"])
def test_noise_in_place_of_the_weights_does_not(name: str, embedded: tuple[Any, Any], tmp_path: Path) -> None:
    """What the test above can see. Noise costs the other recipes little: of those the digest alone tells."""
    recipe, draw = load_recipe(name), torch.Generator().manual_seed(0)
    parts = learned_parts(fresh_stages(recipe, host_of(anatomy(embedded[0]))))
    for part in parts.values():
        for parameter in part.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
    noise, _ = write_weights(recipe, parts, tmp_path, made_by="a test")
    assert right(embedded, [load_recipe(noise)])[name] < MEASURED["few"]["right"][name] - SLACK
