"""What `dropped: skip_ffn` does not go with is refused by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, inputs
from kinds import fixed, recipe, skipping, stage

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import InvalidRecipeError, load_recipe
from tokenprune.serving import PictureReducer
from tokenprune.stage import Stage

SKIPS = skipping(3)["stages"][0]


def test_what_cannot_be_is_refused_by_name() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    with pytest.raises(UnsupportedModelError, match="compile: a stage with dropped: skip_ffn is not compiled yet"):
        tp.attach(model, skipping(2), compile={"backend": "eager"})
    model.train().gradient_checkpointing_enable()
    with (
        tp.attach(model, skipping(2)),
        pytest.raises(UnsupportedModelError, match=r"stage.* \(before_layer: 2\).*checkpointing"),
    ):
        model(**batch)
    with pytest.raises(UnsupportedModelError, match=r"dropped: skip_ffn: layer 1 of .* is recurrent"):
        tp.attach(build("qwen3_5"), skipping(1))
    other = build("llava", layers=4)
    other.get_decoder().layers[3].feeding = other.get_decoder().layers[3].mlp
    del other.get_decoder().layers[3].mlp
    with pytest.raises(UnsupportedModelError, match="nobody knows where the feed-forward of layer 3"):
        tp.attach(other, skipping(2))
    with pytest.raises(RecipeError, match=r"serving: .*its dropped tokens skip feed-forwards"):
        PictureReducer(skipping("after_vision"))
    with pytest.raises(InputError, match="skip_ffn acts inside the layers of a language model"):
        tp.build(skipping("after_vision"))["after_vision"](tp.Tokens.from_hidden(torch.randn(1, 25, 8), grid=(1, 5, 5)))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (skipping(2, positions="renumber"), "nothing to renumber"),
        (skipping(2, rectifier="log_mass"), "a rectifier makes up for tokens"),
        (
            recipe("x", {**SKIPS, "place": {"in_vision": {"block": 1}}}),
            "put the stage behind the tower",
        ),
        (
            recipe("x", SKIPS, stage(5, fixed(2), scorer="norm")),
            "no stage may follow, and 'stage_1' does",
        ),
        (skipping(2, dropped="skip_fn"), "skip_ffn"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(made: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pipeline(load_recipe(made).build_stages(), depth=8)


def test_pictures_apart_are_refused_where_the_recipe_is_read() -> None:
    with pytest.raises(InvalidRecipeError, match=r"stages\.0\.dropped: .*leave out pictures: apart"):
        load_recipe({**skipping("after_vision"), "pictures": "apart"})


def test_stages_made_in_python_are_held_to_the_same() -> None:
    with pytest.raises(RecipeError, match="nothing to renumber"):
        Stage(place=2, dropped="skip_ffn", positions="renumber")
    with pytest.raises(RecipeError, match="did you mean 'skip_ffn'"):
        Stage(place=2, dropped="skip_fnn")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"no stage may follow, and later \(before_layer: 3\) does"):
        Pipeline([Stage(place=2, dropped="skip_ffn"), Stage(place=3, name="later")], depth=4)
    with pytest.raises(RecipeError, match="leave out pictures: apart"):
        Pipeline([Stage(place="after_vision", dropped="skip_ffn")], depth=4, pictures="apart")


def test_recipes_that_do_not_ask_for_it_keep_their_fingerprints() -> None:
    plain, asked = load_recipe(skipping(2, dropped="leave")), load_recipe(skipping(2))
    assert "dropped" not in plain.to_dict()["stages"][0]
    assert plain.fingerprint != asked.fingerprint
    assert load_recipe(asked.to_dict()).fingerprint == asked.fingerprint


def test_a_flash_kernel_is_refused_before_anything_runs() -> None:
    with tp.attach(build("llava", layers=2), skipping(1)) as attached:
        with pytest.raises(UnsupportedModelError, match=r"\(before_layer: 1\): dropped: skip_ffn: .* flash kernel"):
            attached.engine.feed_forwards.check(flash=True)
        attached.engine.feed_forwards.check(flash=False)


def test_experts_beside_an_mlp_are_refused() -> None:
    model = build("llava", layers=3)
    model.get_decoder().layers[2].experts = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layer 2 of LLaVA.*experts run beside its mlp"):
        tp.attach(model, skipping(1))
