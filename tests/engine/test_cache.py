"""Cache layers: what they store, what they report, what crop and reset leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, FAMILIES, Row, build, inputs
from kinds import KINDS, fixed, kinds, recipe, stage
from pruned import logits_of

import tokenprune as tp
from tokenprune.errors import InputError, UnsupportedModelError

THREE = recipe(
    "three", stage(1, fixed(12), scorer="random"), stage(3, fixed(8), scorer="norm"), stage(5, fixed(3), scorer="norm")
)


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_layers_store_the_survivors_and_report_the_prompt(family: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()])
    length = batch["input_ids"].shape[1]
    with torch.no_grad(), tp.attach(model, THREE) as attached:
        cache = model(**batch, use_cache=True)[CACHE]
    gone = attached.report.total[0] - attached.report.vision_tokens[0]
    assert [layer.keys.shape[-2] for layer in cache.layers] == (length - gone).tolist()
    assert [layer.get_seq_length() for layer in cache.layers] == [length] * 8
    assert [type(layer) for layer in cache.layers[:1]] == [tf.cache_utils.DynamicLayer]


@pytest.mark.parametrize("family", FAMILIES)
def test_static_layers_own_smaller_buffers(family: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()])
    length = batch["input_ids"].shape[1]
    cache = tf.StaticCache(config=model.config.get_text_config(), max_cache_len=length + 10)
    with torch.no_grad(), tp.attach(model, THREE) as attached:
        first = model(**batch, **{CACHE: cache}).logits
        gone = attached.report.total[0] - attached.report.vision_tokens[0]
        assert [layer.keys.shape[-2] for layer in cache.layers] == (length + 10 - gone).tolist()
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [length] * 8
        assert [layer.get_max_length() for layer in cache.layers] == [length + 10] * 8
        cache.reset()
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [0] * 8
        # What does not fit the small buffers must fit again after the reset.
        model(**batch, **{CACHE: cache})
        assert torch.equal(first, logits_of(model, batch, **{CACHE: reset(cache)}))
    plain = model(**batch, **{CACHE: reset(cache)}).logits
    assert plain.shape[1] == length


def reset(cache: tf.StaticCache) -> tf.StaticCache:
    cache.reset()
    return cache


def test_scoring_never_touches_the_cache() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    with torch.no_grad(), tp.attach(model, KINDS["attention"]) as attached:
        cache = model(**batch, use_cache=True)[CACHE]
    entered = batch["input_ids"].shape[1] - attached.report.total[0] + attached.report.vision_tokens[0]
    assert [layer.keys.shape[-2] for layer in cache.layers] == entered.tolist()


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("kind", [tf.DynamicCache, tf.StaticCache])
def test_crop_takes_tokens_off_the_end(kind: Any, cut: int) -> None:
    """Prompt-lookup decoding crops; it may cut into the text behind the image."""
    if kind is tf.StaticCache and not getattr(tf.cache_utils.StaticLayer, "is_croppable", False):
        pytest.skip("transformers before 5.24 does not crop static caches")
    model = build("llava")
    batch = inputs("llava", model)
    room = {"max_cache_len": batch["input_ids"].shape[1] + 2} if kind is tf.StaticCache else {}
    whole = kind(config=model.config.get_text_config(), **room)
    ragged = KINDS["adaptive"]
    with torch.no_grad(), tp.attach(model, ragged):
        model(**batch, **{CACHE: whole})
        whole.crop(-cut)
        again = {
            "input_ids": batch["input_ids"][:, -cut:],
            "attention_mask": batch["attention_mask"],
        }
        resumed = model(**again, **{CACHE: whole}).logits[:, -1]
        expected = logits_of(model, batch)[:, -1]
    assert (resumed - expected).abs().max() < 1e-5


def test_batch_selection_and_repetition_carry_the_slots() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    step = {"input_ids": torch.tensor([[7], [8]])}
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)

    def cache() -> tf.DynamicCache:
        return model(**batch, use_cache=True)[CACHE]

    with torch.no_grad(), tp.attach(model, KINDS["adaptive"]):
        both = model(**step, attention_mask=mask, **{CACHE: cache()}).logits
        picked = cache()
        picked.batch_select_indices(torch.tensor([1]))
        one = model(input_ids=step["input_ids"][1:], attention_mask=mask[1:], **{CACHE: picked}).logits
        repeated = cache()
        repeated.batch_repeat_interleave(2)
        four = model(
            input_ids=step["input_ids"].repeat_interleave(2, 0),
            attention_mask=mask.repeat_interleave(2, 0),
            **{CACHE: repeated},
        ).logits
    assert (one - both[1:]).abs().max() < 1e-5
    assert (four[::2] - both).abs().max() < 1e-5
    assert (four[1::2] - both).abs().max() < 1e-5


def test_a_cache_goes_by_its_earlier_name_too() -> None:
    """transformers 5.24 renames the argument inside a forward: hooks before it, and our `generate`, see what was
    written."""
    model, small = build("llava", layers=4), kinds(4)
    batch = inputs("llava", model)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    position = mask.sum(1, keepdim=True) - 1
    embedded = model.get_input_embeddings()(torch.tensor([[7], [8]]))
    results = []
    for name in (CACHE, "past_key_values"):
        with torch.no_grad(), tp.attach(model, small["adaptive"]):
            cache = model(**batch, use_cache=True)[CACHE]
            step = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": position}
            hidden = model.get_decoder()(**step, **{name: cache}).last_hidden_state
        with tp.attach(model, small["after_vision"], compile={"backend": "eager"}):
            results.append((hidden, model.generate(**batch, max_new_tokens=3, **{name: tf.DynamicCache()})))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --------------------------------------------------------------------------------- a cache that outlives its recipe


def shortened(model: Any, batch: Any, kind: Any, asked: Any = THREE) -> Any:
    """A cache that a recipe, attached no more, has shortened."""
    room = {"max_cache_len": batch["input_ids"].shape[1] + 8} if kind is tf.StaticCache else {}
    cache = kind(config=model.config.get_text_config(), **room)
    with torch.no_grad(), tp.attach(model, asked):
        model(**batch, **{CACHE: cache})
    return cache


def following(batch: Any, tokens: int) -> dict[str, torch.Tensor]:
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, tokens), value=1)
    return {"input_ids": torch.full((len(mask), tokens), 7), "attention_mask": mask}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", [tf.DynamicCache, tf.StaticCache])
def test_a_cache_says_so_when_its_recipe_is_gone(kind: Any, tokens: int) -> None:
    model, other = build("llava", layers=6), build("llava", layers=6)
    batch = inputs("llava", model)
    later = following(batch, tokens)
    gone = r"recipe 'three' \(\w+\) has shortened, and that recipe is not attached to the model that now reads it"
    with pytest.raises(UnsupportedModelError, match=gone):
        logits_of(model, later, **{CACHE: shortened(model, batch, kind)})
    with pytest.raises(UnsupportedModelError, match=gone):
        logits_of(model, later, **{CACHE: copy.deepcopy(shortened(model, batch, kind))})
    with tp.attach(other, THREE), pytest.raises(UnsupportedModelError, match=gone):
        logits_of(model, later, **{CACHE: shortened(model, batch, kind)})
    half = recipe("half", stage(4, fixed(0.5), scorer="random"))
    message = r"'three' \(\w+\) has shortened, but 'half' \(\w+\) is attached; attach the first one"
    cache = shortened(model, batch, kind)
    with tp.attach(model, half), pytest.raises(UnsupportedModelError, match=message):
        logits_of(model, later, **{CACHE: cache})
    assert logits_of(model, batch, **{CACHE: reset(cache)}).shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("kind", [tf.DynamicCache, tf.StaticCache])
def test_the_same_recipe_goes_on_where_it_was_detached(kind: Any) -> None:
    model, other = build("llava", layers=6), build("llava", layers=6)
    batch = inputs("llava", model)
    later = following(batch, 3)
    room = {"max_cache_len": batch["input_ids"].shape[1] + 8} if kind is tf.StaticCache else {}
    with tp.attach(model, THREE):
        cache = kind(config=model.config.get_text_config(), **room)
        logits_of(model, batch, **{CACHE: cache})
        expected = logits_of(model, later, **{CACHE: cache})
    for owner in (model, other):
        cache = shortened(model, batch, kind)
        with tp.attach(owner, THREE):
            assert torch.equal(logits_of(owner, later, **{CACHE: cache}), expected)


@pytest.mark.parametrize("kind", [tf.DynamicCache, tf.StaticCache])
def test_crop_into_a_shortened_picture_is_refused(kind: Any) -> None:
    model = build("llava", layers=6)
    batch = inputs("llava", model, rows=[Row(after=7)])
    cache = shortened(model, batch, kind)
    with pytest.raises(InputError, match=r"crop to 27 tokens reaches into pictures that recipe 'three' \(\w+\) has"):
        cache.crop(-8)
    shortened(model, batch, kind).crop(-7)


def test_a_static_cache_may_be_reset_twice() -> None:
    model = build("llava", layers=6)
    batch = inputs("llava", model, rows=[Row()])
    cache = shortened(model, batch, tf.StaticCache)
    room = batch["input_ids"].shape[1] + 8
    for _ in range(3):
        cache.reset()
        assert [(layer.get_max_length(), layer.max_cache_len) for layer in cache.layers] == [(room, room)] * 6
        assert [layer.get_mask_sizes(1) for layer in cache.layers] == [(room, 0)] * 6
    plain = logits_of(model, batch)
    assert torch.equal(logits_of(model, batch, **{CACHE: cache}), plain)
    with tp.attach(model, THREE):  # in buffers of full size
        assert torch.equal(logits_of(model, batch, **{CACHE: reset(reset(cache))}), logits_of(model, batch))


def test_a_compiled_stage_before_layer_0_is_exact_on_a_static_cache() -> None:
    """The buffers are smaller before anything has been removed, and masks must be sized all the same."""
    model = build("llava", layers=2, attention="eager")
    batch = inputs("llava", model)
    asked = KINDS["after_vision"]
    room = batch["input_ids"].shape[1] + 8
    results = []
    for how in ({}, {"compile": {"backend": "eager"}}):
        cache = tf.StaticCache(config=model.config.get_text_config(), max_cache_len=room)
        with torch.no_grad(), tp.attach(model, asked, **how):
            logits = [model(**each, **{CACHE: cache}).logits[:, -1] for each in (batch, following(batch, 1))]
        results.append(torch.stack(logits))
    torch.compiler.reset()
    assert (results[0] - results[1]).abs().max() < 1e-5
