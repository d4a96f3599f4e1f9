"""Attach and detach: no trace, no silent failure, and a clear no to what cannot be exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, FAMILIES, IMAGE, Row, build, inputs, row_inputs, text_only_inputs
from kinds import ATTENTION, IDENTITY, KINDS, fixed, recipe, stage
from pruned import logits_of, snapshot
from reference import generate_logits
from torch import nn
from transformers.generation.continuous_batching import PagedAttentionCache

import tokenprune as tp
from tokenprune.errors import BudgetError, InputError, NotFiredError, RecipeError, UnsupportedModelError

HALF = recipe("half", stage(2, fixed(0.5), scorer="random"))


def bit_equal(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_identical(family: str, attention: Any, options: dict[str, Any]) -> None:
    model = build(family, attention=attention)
    batch = inputs(family, model)
    plain = generate_logits(model, batch, **options)
    with tp.attach(model, IDENTITY) as attached:
        kept = generate_logits(model, batch, **options)
        full = logits_of(model, batch)
    assert torch.equal(plain[0], kept[0]) and bit_equal(plain[1], kept[1])
    assert torch.equal(full, logits_of(model, batch))
    assert attached.report.vision_tokens.tolist() == [[n] * 8 for n in attached.report.total]


@pytest.mark.parametrize("name", ["keep", "average", "final"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_everything_is_bit_identical(kind: str, name: str) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    plain = logits_of(model, batch)
    with tp.attach(model, KINDS[kind], **{name: 1.0}):
        assert torch.equal(logits_of(model, batch), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_no_trace(family: str) -> None:
    model = build(family)
    untouched = build(family)
    batch = inputs(family, model)
    logits_of(model, batch)  # transformers itself adds hooks to some vision towers in their first forward
    before = snapshot(model)
    attached = tp.attach(model, KINDS["merging"])
    pruned = generate_logits(model, batch)
    assert snapshot(model) != before
    attached.detach()
    attached.detach()
    assert snapshot(model) == before
    plain, again = generate_logits(untouched, batch), generate_logits(model, batch)
    assert not bit_equal(plain[1], pruned[1])
    assert torch.equal(plain[0], again[0]) and bit_equal(plain[1], again[1])


def test_an_exception_inside_the_block_detaches() -> None:
    model = build("qwen3_vl")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), tp.attach(model, HALF):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_a_forward_that_raises_leaves_the_next_one_clean() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, HALF) as attached:
        good = logits_of(model, batch)
        layer = model.get_decoder().layers[5]
        handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(model, batch)
        handle.remove()
        with pytest.raises(NotFiredError):
            _ = attached.report.stages
        assert torch.equal(logits_of(model, batch), good)


def test_a_second_recipe_on_the_same_model_is_refused() -> None:
    model = build("llava")
    with tp.attach(model, HALF), pytest.raises(UnsupportedModelError, match="'half' is attached to this model already"):
        tp.attach(model, KINDS["deep"])
    with tp.attach(model, KINDS["deep"]):
        pass


def test_the_users_own_generate_comes_back() -> None:
    model = build("llava")
    model.generate = own = lambda *args, **kwargs: "mine"
    with tp.attach(model, HALF):
        assert model.generate() == "mine"
    assert model.generate is own


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_after_detach(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    with tp.attach(model, KINDS["attention"]):
        if family.startswith("qwen"):  # a CLIP tower that has run holds hooks of transformers that cannot be pickled
            logits_of(model, batch)
    pickled = pickle.loads(pickle.dumps(model))
    plain = logits_of(model, batch)
    assert torch.equal(logits_of(pickled, batch), plain)
    with tp.attach(model, KINDS["attention"]):
        logits_of(model, batch)
    assert torch.equal(logits_of(copy.deepcopy(model), batch), plain)


def test_attach_inside_inference_mode() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, KINDS["adaptive"]):
        expected = logits_of(model, batch)
    with torch.inference_mode(), tp.attach(model, KINDS["adaptive"]):
        inside = logits_of(model, batch)
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(inside, expected)
    assert answer.shape[0] == 2


@pytest.mark.in_turn(5)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str, kind: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    batch = inputs(family, model)
    with tp.attach(model, KINDS[kind]) as attached:
        _, logits = generate_logits(model, batch)
    assert all(step.isfinite().all() for step in logits)
    for stage_report in attached.report.stages:
        if stage_report.scores is not None:
            assert stage_report.scores.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_prompts_pass_through_bit_identical(family: str) -> None:
    model = build(family)
    text = text_only_inputs(family, model)
    plain = generate_logits(model, text)
    with tp.attach(model, KINDS["attention"]) as attached:
        through = generate_logits(model, text)
    assert bit_equal(plain[1], through[1])
    assert "no image has come through" in str(attached.report)
    for read in ("stages", "vision_tokens", "total", "grids", "seconds"):
        with pytest.raises(NotFiredError, match="'attention' is attached, but no forward with vision tokens"):
            getattr(attached.report, read)
    with pytest.raises(NotFiredError):
        attached.report.to_dict()


def test_a_text_only_row_beside_one_with_an_image() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(), Row(before=5, images=(), after=4)])
    with tp.attach(model, KINDS["attention"]) as attached:
        _, logits = generate_logits(model, batch)
        counts = attached.report.vision_tokens
        _, alone = generate_logits(model, row_inputs(batch, 0))
    _, text = generate_logits(model, row_inputs(batch, 1))
    assert counts[1].tolist() == [0] * 8
    assert max((a[0] - b[0]).abs().max() for a, b in zip(logits, alone, strict=True)) < 1e-5
    assert max((a[1] - b[0]).abs().max() for a, b in zip(logits, text, strict=True)) < 1e-5


def test_a_stage_that_does_not_fire_raises() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, HALF):
        model.get_decoder().layers[2]._forward_pre_hooks.clear()
        with pytest.raises(NotFiredError, match=r"1 stages were attached, but only these ran: none"):
            logits_of(model, batch)


@pytest.mark.slow
def test_a_model_compiled_before_attach_is_pruned_all_the_same() -> None:
    model = build("llava", layers=3)
    batch = inputs("llava", model)
    with tp.attach(model, HALF):
        expected = logits_of(model, batch)
    model.get_decoder().compile(backend="eager")
    logits_of(model, batch)
    with tp.attach(model, HALF) as attached:
        assert torch.allclose(logits_of(model, batch), expected, atol=1e-5)
        assert attached.report.vision_tokens[0, -1] == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_instead_of_ids(family: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()])
    ids = batch.pop("input_ids")
    batch.pop("mm_token_type_ids", None)
    if family.startswith("qwen"):
        positions = model.model.get_rope_index(
            ids, (ids == IMAGE).long(), image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"]
        )[0]
        batch["position_ids"] = positions
    with tp.attach(model, KINDS["deep"]):
        given = logits_of(model, {**batch, "inputs_embeds": model.get_input_embeddings()(ids)})
        expected = logits_of(model, {**batch, "input_ids": ids})
    assert torch.equal(given, expected)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_half_an_image_is_refused(family: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()])
    embeddings = model.get_input_embeddings()(batch["input_ids"])[:, :12]
    with (
        tp.attach(model, KINDS["after_vision"]),
        pytest.raises(InputError, match=r"uniform.* must know where .*half a pic"),
    ):
        model(inputs_embeds=embeddings)
    with tp.attach(model, HALF) as attached:  # what reads no grid does not care
        model(inputs_embeds=embeddings)
    assert attached.report.vision_tokens[0, [0, -1]].tolist() == [9, 4]


def test_an_unknown_family_is_refused() -> None:
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    with pytest.raises(
        UnsupportedModelError, match=r"no adapter for LlamaForCausalLM \(model_type 'llama'\) \(did you mean"
    ):
        tp.attach(tf.LlamaForCausalLM(config), HALF)
    with pytest.raises(UnsupportedModelError, match=r"no adapter for Linear; supported: llava, llava_next"):
        tp.attach(nn.Linear(2, 2), HALF)


class OwnLayer(tf.cache_utils.DynamicLayer):
    """A cache layer that nobody here knows."""


def test_an_unknown_cache_is_refused_where_something_is_dropped() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    cache = tf.DynamicCache()
    cache.layers += [OwnLayer() for _ in range(8)]
    with tp.attach(model, HALF), pytest.raises(UnsupportedModelError, match="OwnLayer cannot hold"):
        model(**batch, **{CACHE: cache})
    with torch.no_grad():
        plain = model(**batch).logits
    for harmless in (recipe("none"), {**HALF, "budget": {"keep": 1.0}}):
        cache = tf.DynamicCache()
        cache.layers += [OwnLayer() for _ in range(8)]
        with tp.attach(model, harmless), torch.no_grad():
            assert torch.equal(model(**batch, **{CACHE: cache}).logits, plain)


def test_continuous_batching_of_images_is_refused() -> None:
    """transformers itself takes no images there; prompts of text run as if nothing were attached."""
    model = build("llava")
    batch = inputs("llava", model)
    paged = PagedAttentionCache.__new__(PagedAttentionCache)
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    with (
        tp.attach(model, KINDS["after_vision"]),
        pytest.raises(UnsupportedModelError, match="PagedAttentionCache cannot"),
    ):
        model(**batch, cache=paged, position_ids=positions)


def test_a_place_beyond_the_model_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"before_layer: 8: the model has 8 layers, so expected 0 … 7"):
        tp.attach(build("llava"), recipe("late", stage(8, fixed(0.5))))


def test_attention_before_layer_0_is_refused() -> None:
    asking = recipe("early", stage("after_vision", fixed(0.5), raters="last_text", scorer=ATTENTION))
    with pytest.raises(UnsupportedModelError, match="nothing runs before layer 0"):
        tp.attach(build("llava"), asking)


def test_raters_without_text_after_the_image_are_refused() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(images=()), Row(before=9, after=0)])
    with tp.attach(model, KINDS["attention"]), pytest.raises(InputError, match="sample 1: no text token follows"):
        logits_of(model, batch)


def test_a_budget_out_of_range_is_refused() -> None:
    with pytest.raises(BudgetError):
        tp.attach(build("llava"), HALF, keep=1.5)


def test_nan_activations_are_refused() -> None:
    model = build("llava")
    model.get_decoder().layers[0].mlp.down_proj.weight.data.fill_(torch.nan)
    with tp.attach(model, KINDS["attention"]), pytest.raises(InputError, match="gave NaN scores"):
        logits_of(model, inputs("llava", model))


@pytest.fixture(autouse=True)
def _no_compiled_leftovers() -> Iterator[None]:
    yield
    torch.compiler.reset()
