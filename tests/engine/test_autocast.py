"""Autocast of a float32 model: pictures are found whatever the rounding, and stages judge as they do without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, inputs, vision_mask
from kinds import KINDS, recipe, stage
from pruned import logits_of, reference_stages, stage_results, worst
from reference import masked_reference

import tokenprune as tp
from tokenprune.recipe import load_recipe
from tokenprune.stage import Stage

BIASED = recipe(
    "biased",
    stage(
        1,
        {"type": "rank_ratio", "scale": 0.5, "energy": 0.9},
        raters="last_text",
        scorer={"type": "attention", "layer": "next"},
        recycler={"type": "cluster", "share": 0.5, "per_cluster": 3},
        rectifier="log_mass",
    ),
)
RECIPES: dict[str, dict[str, Any]] = {**{name: KINDS[name] for name in ("attention", "merging")}, "biased": BIASED}
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest logit: some units in the last place of each type."""


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_the_masked_reference_under_autocast(family: str, dtype: torch.dtype) -> None:
    model = build(family)
    batch = inputs(family, model)
    for name, asked in RECIPES.items():
        with tp.attach(model, asked) as attached:
            logits_of(model, batch)
            grids = attached.report.grids
            with torch.autocast("cpu", dtype), stage_results(attached) as results:
                pruned = logits_of(model, batch)[:, -5:]
        assert attached.report.grids == grids
        stages = reference_stages(attached.report, results)
        with torch.autocast("cpu", dtype), masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
            expected = logits_of(model, batch)[:, -5:]
        assert worst((pruned,), (expected,)) < ROUNDING[dtype] * expected.abs().max(), name
        for result in results:
            assert result.tokens.mass.dtype == torch.float32


@pytest.mark.parametrize("name", ["merging", "after_vision"])
def test_a_stage_computes_as_without_autocast(name: str) -> None:
    """On the same tokens, bit for bit; masses stay whole numbers, which half precision cannot count."""
    tokens = tp.Tokens.from_hidden(torch.randn(2, 600, 16))
    for made in load_recipe(KINDS[name]).build_stages():
        assert isinstance(made, Stage)
        plain = made(tokens, 40)
        with torch.autocast("cpu", torch.bfloat16):
            under = made(tokens, 40)
        for field in ("hidden", "origin", "mass"):
            assert torch.equal(getattr(under.tokens, field), getattr(plain.tokens, field)), field


def test_a_layer_asked_early_projects_as_it_will() -> None:
    """Its own keys, in its own autocast: the scorer of `layer: next` judges by what the layer then computes."""
    model = build("llava", layers=3)
    keys: list[torch.Tensor] = []
    model.get_decoder().layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
    with tp.attach(model, BIASED), torch.autocast("cpu", torch.bfloat16):
        logits_of(model, inputs("llava", model))
    assert len(keys) == 2 and {key.dtype for key in keys} == {torch.bfloat16}
