"""The tiny models and their inputs are sound: plain transformers runs on them in every way tests of pruning need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import (
    CACHE,
    FAMILIES,
    IMAGE,
    MODELS,
    PAD,
    VISION_END,
    VISION_START,
    Attention,
    Row,
    Side,
    build,
    inputs,
    next_turn,
    ragged_rows,
    row_inputs,
    sizes,
    text_only_inputs,
    vision_mask,
)
from reference import generate_logits
from torch import Tensor
from transformers import DynamicCache

TOLERANCE = 1e-5

families = pytest.mark.parametrize("family", FAMILIES)
everyone = pytest.mark.parametrize("family", MODELS)
sides = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(autouse=True)
def _one_thread_no_gradients() -> Any:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def difference(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return (first - second).abs().max().item()


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_build(family: str, attention: Attention) -> None:
    before = torch.get_rng_state()
    model: Any = build(family, attention=attention)
    assert torch.equal(torch.get_rng_state(), before), "building must not disturb the caller's random numbers"
    text = model.get_decoder()
    assert len(text.layers) == 8 and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert text.config._attn_implementation == model.config.vision_config._attn_implementation == attention
    attn = text.layers[0].self_attn
    assert attn.head_dim >= 16
    assert (attn.k_proj.out_features < attn.q_proj.out_features) == (family != "llava")
    assert (attn.q_proj.bias is not None) == (family in ("qwen2_vl", "qwen2_5_vl"))
    assert hasattr(attn, "q_norm") == (family == "qwen3_vl")


@families
def test_build_is_a_function_of_the_seed(family: str) -> None:
    first, same, other = (dict(build(family, seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


@everyone
def test_models_can_show_an_error(family: str) -> None:
    """Attention has peaks, vision tokens differ from each other, pixels and words and every parameter count."""
    model: Any = build(family, attention="eager")
    batch = inputs(family, model, rows=[Row()])
    embeddings = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: embeddings.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = model(**batch, output_attentions=True)
    hook.remove()
    assert output.logits.isfinite().all() and 0.3 < output.logits.std() < 3
    for attention in output.attentions:
        assert attention[0, :, -1].max(-1).values.mean() > 2.5 / attention.shape[-1]  # of equal ones it would be 1
    vision = torch.nn.functional.normalize(embeddings[0][vision_mask(model, batch["input_ids"])], dim=-1)
    cosines = (vision @ vision.T).fill_diagonal_(0)
    if hasattr(model.model, "image_newline"):  # one and the same vector ends each row: real ties, as in the real model
        newlines = (cosines > 0.999).any(0)
        assert newlines.sum() == 4
        cosines = cosines[~newlines][:, ~newlines]
    assert cosines.max() < 0.98 and cosines.mean() < 0.8

    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(5))
    words = batch["input_ids"].clone()
    words[0, -3] = words[0, -3] + 1
    for change in ({"pixel_values": noise}, {"input_ids": words}):
        assert (model(**{**batch, **change}).logits - output.logits)[0, -1].abs().mean() > 0.01


def test_deepstack_counts() -> None:
    model: Any = build("qwen3_vl")
    batch = inputs("qwen3_vl", model, rows=[Row()])
    expected = model(**batch).logits
    text = model.get_decoder()
    calls = []

    def nothing(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        calls.append(features.shape)
        return hidden

    text._deepstack_process = nothing
    changed = model(**batch).logits
    assert calls == [(16, 64), (16, 64)]
    assert (changed - expected)[0, -1].abs().mean() > 0.05


@families
@sides
def test_inputs(family: str, side: Side) -> None:
    model = build(family)
    rows = [*ragged_rows(family), Row(before=4, images=(), after=2)]
    batch = inputs(family, model, rows=rows, side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    vision = vision_mask(model, ids)
    assert batch.images == (1, 2, 0)
    assert vision[0].sum() != vision[1].sum() and vision[2].sum() == 0
    texts = [3 + 9, 5 + 2 + 5, 4 + 2]
    assert (mask.bool() & ~vision).sum(1).tolist() == texts
    assert 14 <= vision[0].sum() <= 40
    assert ((ids == PAD) == (mask == 0)).all() and (mask == 0).any()
    real = mask[2].bool()
    assert real[0 if side == "right" else -1] and not real[-1 if side == "right" else 0]
    row = ids[1][mask[1].bool()].tolist()
    first, last = row.index(IMAGE), len(row) - row[::-1].index(IMAGE)
    assert first == 5 and len(row) - last == 5
    if family.startswith("qwen"):
        assert row.count(VISION_START) == row.count(VISION_END) == 2
        assert row[first - 1] == VISION_START and row[last] == VISION_END
    again, other = inputs(family, model, rows=rows, side=side), inputs(family, model, rows=rows, side=side, seed=1)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["pixel_values"], other["pixel_values"])
    assert model(**batch).logits.shape == (*ids.shape, 200)


@families
def test_every_size_has_its_own_token_count(family: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row(images=(size,)) for size in sizes(family)])
    counts = vision_mask(model, batch["input_ids"]).sum(1).tolist()
    assert len(set(counts)) == len(counts)
    model(**batch)


@pytest.mark.in_turn(3)
@everyone
@sides
def test_row_alone_equals_batch_row(family: str, side: Side) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[*ragged_rows(family), Row(before=4, images=(), after=2)], side=side)
    if not hasattr(model.model, "get_rope_index"):  # forward counts the padding, which generate does not
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**batch).logits
    for b in range(3):
        alone = row_inputs(batch, b)
        assert alone["attention_mask"].all() and ("pixel_values" in alone) == (b < 2)
        assert difference(model(**alone).logits[0], logits[b][batch["attention_mask"][b].bool()]) < TOLERANCE


@families
@sides
def test_text_only(family: str, side: Side) -> None:
    model = build(family)
    batch = text_only_inputs(family, model, lengths=(6, 9), side=side)
    assert "pixel_values" not in batch and batch["attention_mask"].sum(1).tolist() == [6, 9]
    logits = model(**batch).logits
    assert difference(model(**row_inputs(batch, 0)).logits[0], logits[0][batch["attention_mask"][0].bool()]) < TOLERANCE
    if side == "left":
        assert generate_logits(model, batch, max_new_tokens=3)[0].shape == (2, 9 + 3)


@families
def test_generate_agrees_with_itself(family: str) -> None:
    """Greedy: dynamic cache, static cache, no cache, and each row alone give the same answer."""
    model = build(family)
    batch = inputs(family, model)
    sequences, steps = generate_logits(model, batch)
    assert sequences.shape[1] == batch["input_ids"].shape[1] + 6 and len(steps) == 6
    assert not vision_mask(model, sequences[:, -6:]).any()
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        others, other_steps = generate_logits(model, batch, **options)
        assert torch.equal(others, sequences)
        assert difference(torch.stack(other_steps), torch.stack(steps)) < TOLERANCE
    for b in range(2):
        own, own_steps = generate_logits(model, row_inputs(batch, b))
        assert torch.equal(own[0, -6:], sequences[b, -6:])
        assert difference(torch.stack(own_steps)[:, 0], torch.stack(steps)[:, b]) < TOLERANCE


@families
def test_beams_and_several_answers(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    alone, _ = generate_logits(model, row_inputs(batch, 0), num_beams=3, num_return_sequences=2)
    assert not torch.equal(alone[0], alone[1])
    drawn, _ = generate_logits(model, batch, do_sample=True, num_return_sequences=2)
    assert drawn.shape[0] == 4 and not torch.equal(drawn[0], drawn[1])
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    for cache in caches:
        beams, _ = generate_logits(model, batch, num_beams=3, num_return_sequences=2, **cache)
        assert torch.equal(beams[:2, -6:], alone[:, -6:])
        again, _ = generate_logits(model, batch, do_sample=True, num_return_sequences=2, **cache)
        assert torch.equal(again, drawn)


@families
def test_second_turn_on_the_same_cache(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences, _ = generate_logits(model, batch, **{CACHE: cache})
    turn = next_turn(batch, sequences)
    assert cache.get_seq_length() == sequences.shape[1] - 1
    longer, steps = generate_logits(model, turn, **{CACHE: cache}, max_new_tokens=1)
    whole = model(**{**batch, **turn}).logits
    assert longer.shape[1] == turn["input_ids"].shape[1] + 1
    assert difference(steps[0], whole[:, -1]) < TOLERANCE


def test_mistakes_are_told() -> None:
    llava, qwen = build("llava"), build("qwen2_vl")
    with pytest.raises(ValueError, match=r"\(8, 8\) of llava: expected one of \(\(20, 20\),\)"):
        inputs("llava", llava, rows=[Row(images=((8, 8),))])
    with pytest.raises(ValueError, match="expected even numbers"):
        inputs("qwen2_vl", qwen, rows=[Row(images=((7, 8),))])
    with pytest.raises(ValueError, match="the text between them"):
        inputs("qwen2_vl", qwen, rows=[Row(images=((8, 8), (8, 8)), between=0)])
