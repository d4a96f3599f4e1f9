"""``positions: renumber``: survivors are numbered through, later tokens follow, as older code has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, Row, build, inputs, ragged_rows, vision_mask
from kinds import fixed, recipe, stage
from pruned import TOLERANCE, reference_stages, stage_results, worst
from reference import generate_logits, masked_reference
from renumbered import numbered_through
from transformers import DynamicCache, StaticCache

import tokenprune as tp

TWICE = recipe(
    "twice",
    stage(2, fixed(0.6), scorer="random", positions="renumber"),
    stage(5, fixed(0.3), scorer="norm", positions="renumber"),
)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_renumbered_reference(family: str, shape: str, options: dict[str, Any]) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()] if shape == "single" else ragged_rows(family))
    vision = vision_mask(model, batch["input_ids"])
    with tp.attach(model, TWICE) as attached:
        got, logits = generate_logits(model, batch, **options)
    step = options.get("num_beams", 1)
    stages = [(s.layer, s.kept[::step]) for s in attached.report.stages]
    with numbered_through(model, vision, batch["attention_mask"], stages), masked_reference(model, vision, stages):
        expected, expected_logits = generate_logits(model, batch, **options)
    plain = generate_logits(model, batch, **options)[1]
    assert torch.equal(got, expected)
    assert worst(logits, expected_logits) < TOLERANCE
    with masked_reference(model, vision, stages):
        original = generate_logits(model, batch, **options)[1]
    assert worst(original[:1], logits[:1]) > 100 * TOLERANCE, "renumbering must be visible"
    assert worst(plain[:1], logits[:1]) > 100 * TOLERANCE


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", ["sparsevlm-v1", "sparsevlm-v1.5", "pyramiddrop-code"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_recipes_equal_the_renumbered_reference(family: str, name: str) -> None:
    """Those that follow code which renumbers, merged tokens included."""
    model = build(family)
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    with tp.attach(model, name, keep=0.4) as attached, stage_results(attached) as results:
        got, logits = generate_logits(model, batch)
    stages = reference_stages(attached.report, results)
    survivors = [(s.layer, s.kept if s.anchors is None else torch.cat([s.kept, s.anchors], dim=1)) for s in stages]
    with numbered_through(model, vision, batch["attention_mask"], survivors), masked_reference(model, vision, stages):
        expected, expected_logits = generate_logits(model, batch)
    assert torch.equal(got, expected)
    assert worst(logits, expected_logits) < TOLERANCE


@pytest.mark.parametrize("ids", ["from 3", "with a gap", "falling", "padded on the right", "padded inside"])
def test_numbers_do_not_depend_on_the_prompts_own(ids: str) -> None:
    """Survivors take over the last position ids where these count up, and only there."""
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(after=8)])
    length = batch["input_ids"].shape[1]
    position = torch.arange(3, length + 3)[None]
    if ids == "with a gap":
        position[:, -3:] += 5
    elif ids == "falling":
        position = position.flip(1)
    elif ids == "padded on the right":
        batch["attention_mask"][:, -2:] = 0
        position[:, -2:] = 1
    elif ids == "padded inside":
        batch["attention_mask"][:, -5:-3] = 0
    vision = vision_mask(model, batch["input_ids"])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with tp.attach(model, TWICE) as attached:
            got = model(**batch, position_ids=position).logits[:, -8:]
        stages = [(each.layer, each.kept) for each in attached.report.stages]
        numbered = numbered_through(model, vision, batch["attention_mask"], stages)
        with numbered, masked_reference(model, vision, stages):
            expected = model(**batch, position_ids=position).logits[:, -8:]
    assert (got - expected)[real[:, -8:]].abs().max() < TOLERANCE


@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_stages_that_keep_positions_keep_the_numbers_of_an_earlier_one(family: str, shape: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()] if shape == "single" else ragged_rows(family))
    vision = vision_mask(model, batch["input_ids"])
    once = recipe(
        "once",
        stage(1, fixed(0.8), scorer="random", positions="renumber"),
        stage(3, fixed(0.6), scorer="norm"),
        stage(5, fixed(0.3), scorer="random"),
    )
    with tp.attach(model, once) as attached:
        got, logits = generate_logits(model, batch)
    stages = [(each.layer, each.kept) for each in attached.report.stages]
    numbered = numbered_through(model, vision, batch["attention_mask"], stages[:1])
    with numbered, masked_reference(model, vision, stages):
        expected, expected_logits = generate_logits(model, batch)
    assert torch.equal(got, expected)
    assert worst(logits, expected_logits) < TOLERANCE


def test_renumbering_before_layer_0_is_a_shorter_prompt() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(), Row(before=5, after=4)])
    early = recipe("early", stage("after_vision", fixed(8), sampler="uniform", positions="renumber"))
    with tp.attach(model, early) as attached:
        got, logits = generate_logits(model, batch)
    vision = vision_mask(model, batch["input_ids"])
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        features = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
        embeddings = embeddings.masked_scatter(vision[..., None], features)
    kept = attached.report.stages[0].kept
    rows = []
    for row, own in enumerate(vision):
        survives = ~own
        survives[own.nonzero().flatten()[kept[row]]] = True
        rows.append(survives)
    shorter = torch.stack(rows)
    length = int(shorter[0].sum())
    prompt = {
        "inputs_embeds": embeddings[shorter].view(2, length, -1),
        "attention_mask": batch["attention_mask"][shorter].view(2, length),
    }
    expected, expected_logits = generate_logits(model, prompt)
    assert torch.equal(got[:, -6:], expected[:, -6:])
    assert worst(logits, expected_logits) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_second_turn_goes_on_from_the_lower_number(family: str) -> None:
    """Two turns on one cache equal one prompt with both turns' text, the raters being those of no one."""
    model = build(family)
    batch = inputs(family, model, rows=[Row(after=11)])
    with torch.no_grad(), tp.attach(model, TWICE):
        whole = model(**batch).logits[:, -4:]
        first = {
            k: v[:, :-4] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in batch.items()
        }
        cache = model(**first, use_cache=True)[CACHE]
        then = {"input_ids": batch["input_ids"][:, -4:], "attention_mask": batch["attention_mask"]}
        resumed = model(**then, **{CACHE: cache}).logits
    assert (whole - resumed).abs().max() < TOLERANCE


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_two_images_in_two_turns_equal_both_in_one(positions: str) -> None:
    """An even grid keeps the same tokens of each image either way; so the numbers must go on where the cache ends."""
    model = build("llava")
    both = inputs("llava", model, rows=[Row(before=3, images=[(20, 20)] * 2, between=7, after=5)])
    cut = 3 + 25 + 4
    even = recipe("even", stage(2, fixed(0.48), sampler="uniform", positions=positions))
    with torch.no_grad(), tp.attach(model, even) as attached:
        whole = model(**both).logits[:, -5:]
        assert attached.report.vision_tokens[0, -1] == 24
        first = {
            "input_ids": both["input_ids"][:, :cut],
            "attention_mask": both["attention_mask"][:, :cut],
            "pixel_values": both["pixel_values"][:1],
        }
        cache = model(**first, use_cache=True)[CACHE]
        second = {
            "input_ids": both["input_ids"][:, cut:],
            "attention_mask": both["attention_mask"],
            "pixel_values": both["pixel_values"][1:],
        }
        turns = model(**second, **{CACHE: cache}).logits[:, -5:]
    assert (whole - turns).abs().max() < TOLERANCE


def test_a_step_on_a_static_cache_counts_from_the_cache() -> None:
    """Without position ids, behind a second image: as on a dynamic cache, and as with the position ids given."""
    model = build("llava")
    first, second = (inputs("llava", model, rows=[row]) for row in (Row(), Row(before=4, after=6)))
    length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    logits = {}
    for static in (False, True):
        for more in ({}, {"position_ids": torch.tensor([[length]])}):
            config = model.config.get_text_config()
            cache = StaticCache(config=config, max_cache_len=length + 4) if static else DynamicCache(config=config)
            with torch.no_grad(), tp.attach(model, TWICE):
                model(**first, **{CACHE: cache})
                model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], **{CACHE: cache})
                step = model(input_ids=torch.tensor([[7]]), **{CACHE: cache}, **more)
            logits[static, bool(more)] = step.logits
    assert all((each - logits[False, True]).abs().max() < TOLERANCE for each in logits.values())
