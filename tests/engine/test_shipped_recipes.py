"""Every shipped recipe, as it is and with budgets, on a real model of every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Row, build, inputs
from parts.methods import GOLDEN
from pruned import TOLERANCE, logits_of, run_both
from towers import INSIDE

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError

# tests/engine/test_renumber.py holds these to account
RENUMBERED = {golden.recipe for golden in GOLDEN if golden.renumbers}


NAMES = [name for name in tp.list_recipes() if name not in INSIDE]
"""Those with stages inside the tower are for test_inside_recipes.py."""
EMPTYING = {"todre": ("keep", "average"), "vtw": ()}
"""Recipes with a stage that drops all: the budgets that they use up."""
# CLIP with plain positions, M-RoPE with DeepStack, and the other families in turn: one of each kind for every recipe.
EACH = [
    (family, name)
    for number, name in enumerate(NAMES)
    for family in dict.fromkeys(("llava", "qwen3_vl", FAMILIES[number % len(FAMILIES)]))
]


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(("family", "name"), EACH)
def test_generation_with_every_recipe(family: str, name: str) -> None:
    model = build(family)
    difference, (got, expected), report = run_both(model, inputs(family, model), name)
    assert report.stages or name == "none"
    if name not in RENUMBERED:
        assert torch.equal(got, expected)
        assert difference < TOLERANCE
    if name not in {"none", "sparsevlm-v1"}:  # v1 keeps 13.5 tokens per rank, which may be all of a tiny image
        assert bool((report.feed_forward_tokens[:, -1] < torch.tensor(report.total)).all())


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_budgets_are_met_to_one_token(name: str) -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(images=[(20, 20)] * 2, between=0)])
    for kind, keep in (("keep", 0.4), ("keep", 20), ("average", 0.5), ("final", 7)):
        if kind not in EMPTYING.get(name, (kind,)):
            continue
        with tp.attach(model, name, **{kind: keep}) as attached:
            logits_of(model, batch)
        counts = attached.report.feed_forward_tokens[0].double()  # all that enter a layer, but for skip-vision
        first = min(stage.layer or 0 for stage in attached.report.stages)
        got = {"keep": counts[first:].mean(), "average": counts.mean(), "final": counts[-1]}[kind]
        want = keep if isinstance(keep, int) else keep * 50
        assert want - 1 < got <= want + 1e-9, (kind, keep)


@pytest.mark.parametrize("variant", ["192", "128", "96", "64"])
def test_published_counts_on_576_tokens_and_32_layers(variant: str) -> None:
    """The whole way from the recipe to the report, in a model with LLaVA-1.5's grid and depth."""
    import transformers as tf

    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=48, patch_size=2
    )
    text = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=2, vocab_size=40
    )
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1, image_seq_length=576
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.tensor([1, 2]), torch.full((576,), 39), torch.arange(3, 15)])[None]
    expected = {"192": (309, 204, 113), "128": (312, 117, 39), "96": (249, 55, 27), "64": (82, 32, 18)}[variant]
    with tp.attach(model, tp.load_recipe("sparsevlm-v1.5", variant=variant)) as attached:
        logits_of(model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 48, 48)})
    assert [stage.layer for stage in attached.report.stages] == [3, 7, 16]
    assert tuple(stage.sizes[0] for stage in attached.report.stages) == expected
    counts = [576] * 3 + [expected[0]] * 4 + [expected[1]] * 9 + [expected[2]] * 16
    assert attached.report.vision_tokens[0].tolist() == counts


def test_a_shallow_model_runs_several_stages_before_one_layer() -> None:
    import transformers as tf

    text = tf.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=20, patch_size=2
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.tensor([1, 2]), torch.full((100,), 39), torch.arange(3, 15)])[None]
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 20, 20)}
    for name in tp.list_recipes():
        try:
            attached = tp.attach(model, name)
        except UnsupportedModelError:
            pytest.fail(f"{name} does not fit two layers")
        with attached:
            logits_of(model, batch)
