"""`kv: all_layers`: once the prefill is over, the layers before a stage have lost what it dropped, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, Row, build, inputs, vision_mask
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, run_both, stage_results, two_turns, worst
from reference import generate_logits, masked_reference

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.recipe import load_recipe
from tokenprune.stage import Stage
from tokenprune.testing.runs import reference_stages

ONE = recipe("one", stage(5, fixed(6), scorer="random", kv="all_layers"))


def everywhere(name: str) -> dict[str, Any]:
    """A recipe of `KINDS` whose stages before a layer leave all caches."""
    made = copy.deepcopy(KINDS[name])
    for each in made["stages"]:
        if each["place"] != "after_vision":
            each["kv"] = "all_layers"
    return made


KINDS_EVERYWHERE = {name: everywhere(name) for name in ("attention", "adaptive", "merging")}
MIXED = recipe(
    "mixed",
    stage("after_vision", fixed(0.8), scorer="random"),
    stage(3, fixed(0.4), scorer="norm", kv="all_layers"),
    stage(5, {"type": "threshold", "above": 0.3}, scorer="random"),
)
"""What the last stage drops stays in the caches before it; the one in the middle takes its own out everywhere."""
RECIPES = {**KINDS_EVERYWHERE, "mixed": MIXED, "one": ONE}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llava", kind) for kind in RECIPES),
        ("qwen2_5_vl", "adaptive"),
        ("gemma3", "mixed"),  # windows
        ("gemma3", "merging"),
        ("qwen3_5", "one"),  # recurrent layers
        ("qwen3_5", "mixed"),
    ],
)
def test_decoding_equals_the_masked_reference(family: str, kind: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    difference, (got, expected), report = run_both(model, batch, RECIPES[kind])
    assert difference < TOLERANCE
    assert torch.equal(got, expected)
    assert "all_layers" in [each.kv for each in report.stages]


@pytest.mark.parametrize("mode", ["static", "beams", "eager", "left out"])
def test_modes_equal_the_masked_reference(mode: str) -> None:
    model = build("llava", attention="eager" if mode == "eager" else "sdpa")
    options: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 3},
    }.get(mode, {})
    batch = inputs("llava", model, rows=[Row()] if mode == "left out" else None)  # without padding no mask is made
    difference, (got, expected), _ = run_both(
        model, batch, RECIPES["mixed"], expand=3 if mode == "beams" else 1, **options
    )
    assert difference < TOLERANCE
    assert torch.equal(got, expected)


def test_it_is_not_what_later_layers_alone_give() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    logits = []
    for kv in ("later_layers", "all_layers"):
        made = recipe("one", stage(5, fixed(6), scorer="random", kv=kv))
        with tp.attach(model, made):
            logits.append(generate_logits(model, batch)[1])
    first, other = logits
    assert torch.equal(first[0], other[0]), "the prompt is read as ever"
    assert worst(first[1:], other[1:]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_every_layer_stores_the_survivors_alone(family: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()])
    length = batch["input_ids"].shape[1]
    with torch.no_grad(), tp.attach(model, ONE) as attached:
        cache = model(**batch, use_cache=True)[CACHE]
    short = length - attached.report.total[0] + 6
    assert [layer.keys.shape[-2] for layer in cache.layers] == [short] * 8
    assert [layer.values.shape[-2] for layer in cache.layers] == [short] * 8
    assert [layer.get_seq_length() for layer in cache.layers] == [length] * 8
    assert attached.report.vision_tokens[0].tolist() == [attached.report.total[0]] * 5 + [6] * 3
    told = tp.ledger(model, ONE, grids=[(1, 5, 5)], text=9, new_tokens=3)
    assert {row.kv_bytes for row in told.reduced.rows} == {told.reduced.rows[-1].kv_bytes}
    assert (
        told.reduced.decode
        < tp.ledger(
            model, load_recipe(ONE, sets=["stages.0.kv=later_layers"]), grids=[(1, 5, 5)], text=9, new_tokens=3
        ).reduced.decode
    )


def test_a_second_turn_goes_on_from_it() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    (sequences, logits), (wanted, expected), _ = two_turns(model, batch, ONE)
    assert torch.equal(sequences, wanted)
    assert worst(logits, expected) < TOLERANCE


def test_keeping_everything_is_bit_identical() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    _, plain = generate_logits(model, batch)
    with tp.attach(model, recipe("all", stage(3, fixed(1.0), scorer="norm", kv="all_layers"))):
        _, kept = generate_logits(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_the_end_of_a_cache_can_be_cropped_and_pictures_cannot() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    with torch.no_grad(), tp.attach(model, ONE):
        cache = model(**batch, use_cache=True)[CACHE]
        stored, length = cache.layers[0].keys.shape[-2], cache.get_seq_length()
        cache.crop(-2)
        assert (cache.layers[0].keys.shape[-2], cache.get_seq_length()) == (stored - 2, length - 2)
        with pytest.raises(InputError, match="reaches into pictures"):
            cache.crop(-(length - 4))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_answers_that_are_read_with_the_prompt_are_refused(options: dict[str, Any]) -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(after=6)])
    batch["input_ids"][:, -1] = batch["input_ids"][:, -4]  # a word that came before: what follows it is looked up
    with tp.attach(model, ONE), pytest.raises(UnsupportedModelError, match="kv: all_layers hides what is dropped"):
        generate_logits(model, batch, **options)


def test_a_loss_is_that_of_an_answer_read_behind_the_prompt() -> None:
    """With the prompt in one call it would be another: of tokens that see everything in the layers below."""
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    _, (sequences, _), _ = run_both(model, batch, ONE)
    answer = sequences[:, batch["input_ids"].shape[1] :]
    with torch.no_grad(), tp.attach(model, ONE) as attached, stage_results(attached) as results:
        with pytest.raises(UnsupportedModelError, match="labels ask for a loss over tokens that came together with it"):
            model(**batch, labels=batch["input_ids"])
        cache = model(**batch, use_cache=True)[CACHE]
        stages = reference_stages(attached.report, results)
        loss = model(input_ids=answer, labels=answer, **{CACHE: cache}).loss
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        _, expected = generate_logits(model, batch)
    wanted = torch.nn.functional.cross_entropy(torch.cat(list(expected[1:])), answer[0, 1:])
    assert abs(loss - wanted) < TOLERANCE
    with torch.no_grad(), tp.attach(model, recipe("all", stage(5, fixed(1.0), scorer="norm", kv="all_layers"))):
        kept = model(**batch, labels=batch["input_ids"]).loss  # nothing is dropped, so nothing is hidden
    assert torch.equal(kept, model(**batch, labels=batch["input_ids"]).loss)


def test_a_static_cache_is_reset_to_its_full_room() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    length = batch["input_ids"].shape[1]
    cache = tf.StaticCache(config=model.config.get_text_config(), max_cache_len=length + 10)
    with torch.no_grad(), tp.attach(model, ONE):
        first = model(**batch, **{CACHE: cache}).logits
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [length] * 8
        assert [layer.get_max_length() for layer in cache.layers] == [length + 10] * 8
        cache.reset()
        assert torch.equal(first, model(**batch, **{CACHE: cache}).logits)


@pytest.mark.slow
def test_a_compiled_recipe_gives_the_same() -> None:
    """The caches are cut behind the graph of the prefill, at their addresses; decode steps are a graph of their own."""
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    asked = recipe("few", stage(2, fixed(6), scorer="random", kv="all_layers"))
    with tp.attach(model, asked):
        expected, expected_logits = generate_logits(model, batch)
    try:
        with tp.attach(model, asked, compile={"backend": "eager"}) as attached:
            sequences, logits = generate_logits(model, batch)
            graphs = attached.report.graphs
    finally:
        torch.compiler.reset()
    assert graphs is not None and (graphs.breaks, graphs.recompiles) == (0, 0)
    assert torch.equal(sequences, expected)
    assert worst(logits, expected_logits) < TOLERANCE


def test_where_no_layer_comes_before_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="'all_layers' is without effect: no layer comes before after_vision"):
        load_recipe(recipe("x", stage("after_vision", fixed(0.5), scorer="norm", kv="all_layers")))
    with pytest.raises(RecipeError, match="without effect"):
        Stage(place="after_vision", kv="all_layers")
    with pytest.raises(RecipeError, match="did you mean 'all_layers'"):
        Stage(place=2, kv="all_layer")  # type: ignore[arg-type]


def test_recipes_that_do_not_ask_for_it_keep_their_fingerprints() -> None:
    plain, asked = (
        load_recipe(recipe("x", stage(2, fixed(0.5), scorer="norm", **more))) for more in ({}, {"kv": "all_layers"})
    )
    assert "kv" not in plain.to_dict()["stages"][0]
    assert (
        plain.fingerprint
        == load_recipe(recipe("x", stage(2, fixed(0.5), scorer="norm", kv="later_layers"))).fingerprint
    )
    assert plain.fingerprint != asked.fingerprint
    assert load_recipe(asked.to_dict()).fingerprint == asked.fingerprint
