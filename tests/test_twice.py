"""A recipe with `again`: a cheap first pass, a full one where it is not sure, both counted, and refused elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError
from tokenprune.recipe import Recipe, list_loop_recipes, load_recipe
from tokenprune.scenes import samples


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    model, processor = tp.load("embedded")
    return model, processor


def pooled(*sets: str) -> Recipe:
    return load_recipe("visionthink", variant="pooled", sets=sets)


def test_a_sure_first_pass_answers_and_is_all_that_is_paid(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    sample = samples()[0]
    answer = tp.ask(model, processor, sample.path, sample.question, pooled("again.below=0"))
    (first,) = answer.passes
    alone = tp.ask(model, processor, sample.path, sample.question, pooled().first_pass)
    assert (first.name, str(answer)) == ("first", str(alone))
    assert first.report.vision_tokens.tolist() == alone.report.vision_tokens.tolist() == [[36] * 8]
    assert answer.report is first.report
    assert 0 < first.probability <= 1
    assert not model._forward_pre_hooks, "the recipe is gone again"


def test_an_unsure_first_pass_is_asked_again_with_everything(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    sample = samples()[0]
    sure = tp.ask(model, processor, sample.path, sample.question, pooled("again.below=0")).passes[0]
    whole = tp.ask(model, processor, sample.path, sample.question, None)
    higher = min(1.0, sure.probability + 1e-4)
    recipes = [pooled("again.below=0", f"again.request={str(sure.text)!r}")]
    recipes += [pooled(f"again.below={higher}")] * (sure.probability < higher)
    for recipe in recipes:
        answer = tp.ask(model, processor, sample.path, sample.question, recipe)
        first, full = answer.passes
        assert (first.text, first.probability) == (sure.text, sure.probability)
        assert (full.name, full.text, str(answer)) == ("full", str(whole), str(whole))
        assert answer.report is full.report and full.report.vision_tokens.tolist() == [[144] * 8]
        assert first.multiply_adds < full.multiply_adds


def test_what_it_cannot_do_is_told(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = embedded
    sample = samples()[0]
    with pytest.raises(InputError, match=r"144 vision tokens, with full pictures 144.*variant `pooled`"):
        tp.ask(model, processor, sample.path, sample.question, "visionthink")
    for refused in (lambda: tp.attach(model, "visionthink"), lambda: tp.build("visionthink", depth=8)):
        with pytest.raises(RecipeError, match=r"visionthink asks again .* only `tp.ask` and `tokenprune run`"):
            refused()
    assert not model._forward_pre_hooks


def test_when_to_ask_again_is_part_of_what_a_recipe_does() -> None:
    assert list_loop_recipes() == ["visionthink"]
    recipe = load_recipe("visionthink")
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(recipe.to_dict()).fingerprint == recipe.fingerprint
    assert len({recipe.fingerprint, pooled().fingerprint, pooled("again.below=0.5").fingerprint}) == 3
    with pytest.raises(RecipeError, match=r"again.below"):
        pooled("again.below=1.5")
    with pytest.raises(RecipeError, match=r"'wieghts' in again \(did you mean 'weights'\?\); allowed: pixels, below, "):
        pooled("again.wieghts=null")
