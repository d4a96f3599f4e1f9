"""Layers that are not plain causal attention: windows, recurrent states, shared keys, and what is refused there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CACHE, Row, build, inputs, ragged_rows, text_only_inputs
from family_models import MODELS
from kinds import fixed, recipe, stage
from pruned import TOLERANCE, logits_of, run_both, worst
from reference import generate_logits

import tokenprune as tp
from tokenprune.engine import engine
from tokenprune.engine.forward import Forward
from tokenprune.errors import UnsupportedModelError

FEW = recipe("few", stage("after_vision", fixed(2), scorer="norm"))
HALF = recipe("half", stage(2, fixed(0.5), scorer="norm"))


@pytest.mark.parametrize("family", ["gemma3", "cohere2_vision"])
def test_a_window_counts_the_untouched_tokens(family: str) -> None:
    """What is left would fit into one window: words before the image still lie outside those of words behind it."""
    model = build(family)
    batch = inputs(family, model, rows=[Row(before=4, after=4)])
    difference, (got, expected), report = run_both(model, batch, FEW)
    assert batch["input_ids"].shape[1] > 16 > batch["input_ids"].shape[1] - report.total[0] + 2
    assert torch.equal(got, expected) and difference < TOLERANCE
    wide = build(family)
    for layer in wide.get_decoder().layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and 512
    wide.config.get_text_config().sliding_window = 512
    with tp.attach(model, FEW):
        narrow = generate_logits(model, batch)[1]
    with tp.attach(wide, FEW):
        assert worst(narrow, generate_logits(wide, batch)[1]) > 100 * TOLERANCE, "the window must be seen"


def test_a_window_and_a_flash_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts the window in the tokens that it is given."""
    monkeypatch.setattr(engine, "Forward", lambda **told: Forward(**{**told, "flash": True}))
    model = build("gemma3")
    batch = inputs("gemma3", model)
    with tp.attach(model, HALF), pytest.raises(UnsupportedModelError, match="flash attention counts a sliding window"):
        logits_of(model, batch)


def test_layers_that_share_keys_are_refused() -> None:
    model_class, config = MODELS["gemma4"].config()
    config.get_text_config().num_kv_shared_layers = 3
    model = model_class._from_config(config)
    with pytest.raises(UnsupportedModelError, match="attach: Gemma 4 whose last 3 layers read keys and values of"):
        tp.attach(model, HALF)


def test_a_bias_on_keys_is_refused_where_a_layer_has_none() -> None:
    model = build("qwen3_5")
    merged = {"recycler": {"type": "cluster", "share": 0.5, "per_cluster": 3}, "rectifier": "log_mass"}
    asked = recipe("biased", stage(1, fixed(0.5), scorer="norm", **merged))
    with tp.attach(model, asked), pytest.raises(UnsupportedModelError, match="recurrent layers have no keys"):
        logits_of(model, inputs("qwen3_5", model))


def test_padding_inside_a_recurrent_state_is_refused() -> None:
    """A turn of samples that keep different numbers would be padded behind a state that is not empty any more."""
    model: Any = build("lfm2_vl")
    first = text_only_inputs("lfm2_vl", model, lengths=(6, 6))
    second = inputs("lfm2_vl", model, rows=ragged_rows("lfm2_vl"))
    with torch.no_grad(), tp.attach(model, HALF):
        cache = model(**first, use_cache=True)[CACHE]
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        with pytest.raises(UnsupportedModelError, match="padded, which would move the states"):
            model(**{**second, "attention_mask": mask}, **{CACHE: cache})


def test_a_recurrent_layer_names_those_that_have_attention() -> None:
    model = build("lfm2_vl")
    asked = recipe("rated", stage(2, fixed(0.5), raters="last_text", scorer={"type": "attention"}))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 of LFM2-VL is recurrent .* these have: 2, 5, 7\."):
        tp.attach(model, asked)


OBLONG = [name for name, tiny in MODELS.items() if len(tiny.sizes) > 1 and name != "idefics2"]


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", OBLONG)
def test_grids_are_as_high_and_wide_as_the_pictures(family: str) -> None:
    model = build(family)
    tiny = MODELS[family]
    batch = inputs(family, model, rows=[Row(images=(size,)) for size in tiny.sizes])
    with tp.attach(model, HALF) as attached:
        logits_of(model, batch)
    for (height, width), grids, total in zip(tiny.sizes, attached.report.grids, attached.report.total, strict=True):
        assert sum(t * h * w for t, h, w in grids) == total
        if len(grids) == 1:  # no tiles
            _, rows, columns = grids[0]
            assert rows * width == columns * height
