"""Biases on survivors' keys: the masked reference with the same bias, in every mode; no bias changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, Row, build, inputs, next_turn, row_inputs, vision_mask
from kinds import ATTENTION, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, run_both, stage_results, worst
from reference import generate_logits, masked_reference, pruned_difference, reference_logits

import tokenprune as tp
from tokenprune.engine.cache_layers import Slots
from tokenprune.errors import UnsupportedModelError

CLUSTER = {"type": "cluster", "share": 0.8, "per_cluster": 3}
MERGED = recipe(
    "biased",
    stage(1, fixed(0.5), raters="last_text", scorer=ATTENTION, recycler=CLUSTER, rectifier="log_mass"),
    stage(4, fixed(0.25), raters="last_text", scorer=ATTENTION, recycler=CLUSTER),
)
"""The second stage sees, by its raters' attention, what the bias of the first has done, and carries biases on."""
RENEWED = recipe(
    "renewed",
    stage("after_vision", fixed(0.6), scorer="norm", recycler=CLUSTER, rectifier="log_mass"),
    stage(
        3,
        fixed(0.3),
        raters="above_mean",
        scorer={**ATTENTION, "layer": "next"},
        recycler=CLUSTER,
        rectifier={"type": "log_mass", "strength": 2.0},
    ),
)
RECIPES = {"merged": MERGED, "renewed": RENEWED}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_the_masked_reference_with_the_same_bias(family: str, kind: str, attention: Any) -> None:
    model = build(family, attention=attention)
    batch = inputs(family, model)
    with tp.attach(model, RECIPES[kind]) as attached, stage_results(attached) as results:
        logits = logits_of(model, batch)
    stages = reference_stages(attached.report, results)
    assert all(stage.bias is not None and stage.bias.abs().max() > 0.5 for stage in stages)
    last, vision, real = stages[-1], vision_mask(model, batch["input_ids"]), batch["attention_mask"]
    expected = reference_logits(model, batch, stages)
    assert pruned_difference(logits, expected, vision, real, last.kept, last.anchors) < TOLERANCE
    without = reference_logits(model, batch, [stage._replace(bias=None) for stage in stages])
    assert pruned_difference(logits, without, vision, real, last.kept, last.anchors) > 100 * TOLERANCE


MODES = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_decode_step_adds_it_too(family: str, mode: str, attention: Any) -> None:
    model = build(family, attention=attention)
    batch = inputs(family, model)
    options = MODES[mode]
    if mode == "prompt lookup":  # transformers does it for one sample
        batch = inputs(family, model, rows=[Row()])
    expand = options.get("num_beams", options.get("num_return_sequences", 1))
    difference, (sequences, expected), _ = run_both(model, batch, MERGED, expand=expand, **options)
    assert difference < TOLERANCE
    assert torch.equal(sequences, expected)


def test_a_second_turn_of_text_still_sees_it() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with tp.attach(model, MERGED) as attached, stage_results(attached) as results:
        first = model.generate(**batch, **options)
        turn = next_turn(batch, first.sequences)
        second = model.generate(**turn, **options, **{CACHE: first[CACHE]})
    stages = reference_stages(attached.report, results)
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        before = model.generate(**batch, **options)
        after = model.generate(**next_turn(batch, before.sequences), **options, **{CACHE: before[CACHE]})
    assert worst(second.logits, after.logits) < TOLERANCE


def test_a_row_of_a_batch_has_its_own_bias() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, MERGED):
        together = generate_logits(model, batch)[1]
        for row in range(2):
            alone = generate_logits(model, row_inputs(batch, row))[1]
            assert worst(tuple(step[row : row + 1] for step in together), alone) < TOLERANCE


def test_without_strength_logits_are_those_without_a_rectifier() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    plain = [dict(each) for each in MERGED["stages"]]
    del plain[0]["rectifier"]
    nothing = [dict(each) for each in MERGED["stages"]]
    nothing[0]["rectifier"] = {"type": "log_mass", "strength": 0.0}
    logits = []
    for stages in (plain, nothing):
        with tp.attach(model, recipe("r", *stages)):
            logits.append(generate_logits(model, batch)[1])
    assert worst(*logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_runs_and_stays_near(dtype: torch.dtype, attention: Any) -> None:
    model = build("llava", attention=attention)
    batch = inputs("llava", model)
    with tp.attach(model, MERGED):
        exact = generate_logits(model, batch, max_new_tokens=1)[1][0]
        model.to(dtype)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        rough = generate_logits(model, batch, max_new_tokens=1)[1][0]
    assert torch.corrcoef(torch.stack([exact.flatten(), rough.float().flatten()]))[0, 1] > 0.95


def test_kernels_that_take_no_bias_are_refused_by_name() -> None:
    model = build("llava")
    model.set_attn_implementation("flex_attention")
    refused = pytest.raises(UnsupportedModelError, match=r"bias to the survivors' keys.*'sdpa' or")
    # transformers compiles this kernel and its masks, which takes long and decides nothing here.
    with torch.compiler.set_stance("force_eager"), tp.attach(model, MERGED), refused, torch.no_grad():
        model(**inputs("llava", model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_raters_of_a_later_stage_see_the_biases(family: str, attention: Any) -> None:
    """Scores are the model's own attention, as the masked reference with biases gives it."""
    model = build(family, attention=attention)
    batch = inputs(family, model, rows=[Row()])
    with tp.attach(model, MERGED) as attached, stage_results(attached) as results, torch.no_grad():
        model(**batch)
    first, second = attached.report.stages
    eager = build(family, attention="eager")
    vision = vision_mask(eager, batch["input_ids"])
    with masked_reference(eager, vision, reference_stages(attached.report, results[:1])), torch.no_grad():
        rows = eager(**batch, output_attentions=True).attentions[3][0, :, -1]  # of the layer before the second stage
    expected = rows[:, vision[0]].mean(0)[second.scored[0]]
    assert torch.allclose(second.scores[0], expected, atol=TOLERANCE, rtol=0)
    assert (second.scores[0] > 0).all() and first.sizes[0] == len(expected)


def test_biases_follow_their_slots_through_reordering_and_cropping() -> None:
    slots = Slots(torch.tensor([[0, 3, 7], [1, 2, 7]]), None, 8, None, torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    assert slots.at(torch.tensor([1, 1, 0])).bias.tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert slots.cropped(7).bias.tolist() == [[0, 1], [3, 4]]
    assert not slots.plain and Slots(slots.origin, None, 8).plain


def test_a_sample_that_loses_nothing_has_no_bias_for_what_others_of_its_batch_lose() -> None:
    """As alone, where nothing happens at that stage; the masses are those that the stage before has left."""
    model = build("llava")
    size = (20, 20)
    batch = inputs("llava", model, rows=[Row(images=(size, size)), Row(images=(size,))])
    merged = stage(1, fixed(0.2), scorer="norm", recycler=CLUSTER)
    asked = recipe("some", merged, stage(2, fixed(11), scorer="norm", rectifier="log_mass"))
    with tp.attach(model, asked) as attached:
        together = generate_logits(model, batch, max_new_tokens=2)[1]
        before, after = (each.sizes for each in attached.report.stages)
    assert before[0] > after[0] and before[1] == after[1], "one loses tokens, the other none"
    alone = row_inputs(batch, 1)
    with tp.attach(model, asked):
        single = generate_logits(model, alone, max_new_tokens=2)[1]
    assert worst(tuple(step[1:] for step in together), single) < TOLERANCE
