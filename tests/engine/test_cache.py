"""Cache layers: what they store, what they report, what crop and reset leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, FAMILIES, Row, build, inputs
from kinds import KINDS, fixed, recipe, stage
from pruned import logits_of

import tokenprune as tp

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
    model = build("llava")
    batch = inputs("llava", model)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    position = mask.sum(1, keepdim=True) - 1
    embedded = model.get_input_embeddings()(torch.tensor([[7], [8]]))
    results = []
    for name in (CACHE, "past_key_values"):
        with torch.no_grad(), tp.attach(model, KINDS["adaptive"]):
            cache = model(**batch, use_cache=True)[CACHE]
            step = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": position}
            hidden = model.get_decoder()(**step, **{name: cache}).last_hidden_state
        with tp.attach(model, KINDS["attention"], compile={"backend": "eager"}):
            results.append((hidden, model.generate(**batch, max_new_tokens=3, **{name: tf.DynamicCache()})))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
