"""Models of real shapes with random weights: the shape is the published one, and scales as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, build

import tokenprune as tp
import tokenprune.families.sketch as sketch
from tokenprune.cost.presets import PRESETS
from tokenprune.errors import InputError
from tokenprune.families.noise import any_resolution, noise, smaller_picture, usual_pictures
from tokenprune.families.shape import model_shape

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_are_the_published_shapes(name: str) -> None:
    assert model_shape(sketch.sketch_config(name), name=name) == PRESETS[name]


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b"])
def test_scaled_models_run_with_a_recipe(name: str) -> None:
    config = sketch.sketch_config(name, layers=4, width=256)
    model = sketch.sketch_model(config, dtype=torch.float32, device=CPU)
    shape = model_shape(model)
    assert (shape.decoder.layers, shape.decoder.width, shape.decoder.head_dim) == (4, 256, 128)
    pictures = usual_pictures(config, 576)
    with tp.attach(model, "fastv", keep=0.25) as attached, torch.no_grad():
        logits = model(**noise(model, pictures, text=12, batch=2)).logits
    assert attached.report.vision_tokens.tolist() == [[576, 144, 144, 144]] * 2
    assert attached.report.grids[0] == ((1, 24, 24),)
    assert torch.isfinite(logits).all()
    again = sketch.sketch_model(config, dtype=torch.float32, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-mistral-7b", "qwen2.5-vl-7b"])
def test_parts_keep_their_share(name: str) -> None:
    """At half the width and depth, tower and decoder cost within a third of what they did of the whole."""
    whole = PRESETS[name]
    half = model_shape(
        sketch.sketch_config(name, layers=whole.decoder.layers // 2, width=whole.decoder.width // 2), name=name
    )
    assert half.decoder.heads == whole.decoder.heads // 2
    assert half.decoder.heads % half.decoder.kv_heads == 0
    assert half.vision.layers == whole.vision.layers // 2
    told, before = (tp.ledger(shape, "none", text=64).untouched for shape in (half, whole))
    assert told.decoder < 0.15 * before.decoder
    assert 0.66 < (told.vision_tower / told.prefill) / (before.vision_tower / before.prefill) < 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scales(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations from a folder: read, and changed on a copy."""
    config = build(family).config
    monkeypatch.setattr(sketch, "read_config", lambda name, also: config)
    made = sketch.sketch_model(sketch.sketch_config("x", layers=4, width=32), dtype=torch.float32, device=CPU)
    assert (len(made.get_decoder().layers), made.get_decoder().config.hidden_size) == (4, 32)
    assert config.get_text_config().num_hidden_layers == 8
    if family != "llava_next":
        pictures = usual_pictures(made.config, 25 if family == "llava" else 24)
        with tp.attach(made, "fastv", keep=6) as attached, torch.no_grad():
            assert torch.isfinite(made(**noise(made, pictures, text=8, batch=1)).logits).all()
        assert attached.report.vision_tokens[0, -1] == 6


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_smaller_pictures_run_at_their_size(family: str) -> None:
    model: Any = build(family)
    small = smaller_picture(model.config, 10)
    assert small.grids == ((1, 3, 3),) or small.tokens == 10
    inputs = noise(model, small, text=8, batch=1)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == small.tokens
    with any_resolution(model), torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
        with tp.attach(model, "fastv", keep=4) as attached:
            model(**inputs)
            assert attached.report.grids == (small.grids,)
            model.generate(**inputs, max_new_tokens=2)
    assert attached.report.grids == (small.grids,)
    assert attached.report.vision_tokens[0, -1] == 4
    if family == "llava":
        with pytest.raises(ValueError, match="Input image size"), torch.no_grad():
            model(**inputs)


@pytest.mark.parametrize(
    ("layers", "width", "message"),
    [
        (0, None, "layers: expected at least 1, got 0"),
        (None, 1000, "width: expected a multiple of the head size 128, got 1000; the nearest is 1024"),
        (None, 12, "got 12; the nearest is 128"),
    ],
)
def test_shapes_that_do_not_work(layers: int | None, width: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sketch.sketch_config("llava-1.5-7b", layers=layers, width=width)


def test_no_such_model_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'llava-1.5-7b'"):
        sketch.sketch_config("llava-1.5-7", layers=2)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "free_memory", lambda device: 8 * 2**30)
    config = sketch.sketch_config("llava-1.5-7b")
    with pytest.raises(InputError) as caught:
        sketch.sketch_model(config, dtype=torch.float32, device=CPU)
    assert str(caught.value) == (
        "this model has 7.06 billion parameters, 26.3 GiB in float32, and 8.0 GiB are free on cpu: try --dtype "
        "bfloat16, or fewer --layers or a smaller --width"
    )
    with pytest.raises(InputError, match=r"13.2 GiB in bfloat16, and 8.0 GiB are free on cpu: try fewer --layers or"):
        sketch.sketch_model(config, dtype=torch.bfloat16, device=CPU)


def test_free_memory_is_a_number_or_nothing() -> None:
    free = sketch.free_memory(CPU)
    assert free is None or free > 2**20
    assert sketch.free_memory(torch.device("meta")) is None


def test_an_interpolated_tower_costs_what_its_patches_cost() -> None:
    """At the tower's own size the two shapes agree; half as many patches cost a little less than half."""
    from tokenprune.cost.shape import AnyClip, ClipShape

    own = PRESETS["llava-1.5-7b"].vision
    assert isinstance(own, ClipShape)
    free = own.resized()
    assert isinstance(free, AnyClip)
    square, half = ((1, 24, 24),), ((1, 12, 24),)
    assert free.tower(576, square) == own.tower(576, square)
    assert free.projection(576, square) == own.projection(576, square)
    assert 0.4 < free.tower(288, half) / own.tower(288, half) < 0.5
    assert own.tower(288, half) == own.tower(576, square)
    whole = replace(free, class_token=False)
    assert whole.projection(576, square) == replace(own, class_token=False).projection(576, square)
