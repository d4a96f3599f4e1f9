"""Prompts in chunks: stages wait for the last token, and the result is the masked reference's of the whole prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, FAMILIES, Row, build, inputs, next_turn, sizes, text_only_inputs, vision_mask
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, run_both, stage_results, worst
from reference import generate_logits, masked_reference

import tokenprune as tp
from tokenprune.errors import InputError, UnsupportedModelError

LATE = recipe("late", stage(3, fixed(0.5), scorer="norm"))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_in_chunks_is_the_masked_reference(family: str) -> None:
    """Pictures are cut anywhere; batches, padding and the report are those of a prompt in one piece."""
    model = build(family)
    batch = inputs(family, model)
    for name in ("attention", "adaptive", "merging") if family == "llava" else ("adaptive",):
        with tp.attach(model, KINDS[name]) as attached:
            whole = model.generate(**batch, max_new_tokens=3)
            told = attached.report.to_dict()
        difference, (sequences, expected), report = run_both(model, batch, KINDS[name], prefill_chunk_size=16)
        assert difference < TOLERANCE and torch.equal(sequences, expected)
        assert torch.equal(sequences[:, : whole.shape[1]], whole)
        assert report.grids == attached.report.grids
        for ours, theirs in zip(report.to_dict()["stages"], told["stages"], strict=True):
            assert (ours["kept"], ours["merged"]) == (theirs["kept"], theirs["merged"])


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}])
def test_caches_and_beams(options: dict[str, Any]) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, KINDS["attention"]):
        whole = model.generate(**batch, max_new_tokens=4, **options)
        chunked = model.generate(**batch, max_new_tokens=4, prefill_chunk_size=10, **options)
    assert torch.equal(whole, chunked)


def test_a_second_turn_goes_on_behind_chunks() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, KINDS["merging"]) as attached, stage_results(attached) as results:
        first = model.generate(**batch, max_new_tokens=4, prefill_chunk_size=10, return_dict_in_generate=True)
        later = next_turn(batch, first.sequences, words=12)
        cache = {CACHE: first[CACHE]}
        _, logits = generate_logits(model, later, prefill_chunk_size=5, **cache)
    stages = reference_stages(attached.report, results)
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
        cache = {CACHE: first[CACHE]}
        _, expected = generate_logits(model, later, **cache)
    assert worst(logits, expected) < TOLERANCE


def test_prompts_of_text_are_left_in_chunks() -> None:
    model = build("llava")
    batch = text_only_inputs("llava", model, lengths=(20, 26))
    seen: list[int] = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    plain = model.generate(**batch, max_new_tokens=2, prefill_chunk_size=10)
    chunks, seen[:] = list(seen), []
    with tp.attach(model, LATE):
        assert torch.equal(model.generate(**batch, max_new_tokens=2, prefill_chunk_size=10), plain)
    assert seen == chunks == [10, 10, 6, 1]
    with tp.attach(model, "none"):
        pictures = inputs("llava", model)
        assert model.generate(**pictures, max_new_tokens=2, prefill_chunk_size=40).shape[0] == 2


# ---------------------------------------------------------------------------------------------- chunks by hand


def chunks_of(family: str, model: Any, batch: Any, cut: int) -> list[dict[str, Any]]:
    """One sample of two pictures, cut between them; ids as the whole prompt has them."""
    first, last = slice(None, cut), slice(cut, None)
    own: list[dict[str, Any]] = [{"input_ids": batch["input_ids"][:, at]} for at in (first, last)]
    pixels = batch["pixel_values"]
    if family.startswith("qwen"):
        grid = batch["image_grid_thw"]
        positions, model.model.rope_deltas = model.model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=grid,
            attention_mask=batch["attention_mask"],
        )
        patches = int(grid[0].prod())
        for chunk, at, pictures, rows in zip(
            own, (first, last), (grid[:1], grid[1:]), (pixels[:patches], pixels[patches:]), strict=True
        ):
            chunk.update(position_ids=positions[..., at], image_grid_thw=pictures, pixel_values=rows)
        return own
    for chunk, pictures in zip(own, (slice(0, 1), slice(1, 2)), strict=True):
        chunk["pixel_values"] = pixels[pictures]
        if "image_sizes" in batch:
            chunk["image_sizes"] = batch["image_sizes"][pictures]
    return own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["after_vision", "attention"])
def test_chunks_by_hand(family: str, kind: str) -> None:
    model = build(family)
    two = (sizes(family)[-1], sizes(family)[0])
    batch = inputs(family, model, rows=[Row(before=4, images=two, between=3, after=6)])
    vision = vision_mask(model, batch["input_ids"])[0]
    gap = int((~vision).nonzero().flatten()[4]) + 2  # behind the first picture and a word or two
    chunks = chunks_of(family, model, batch, gap)
    cache = tf.DynamicCache(config=model.config.get_text_config())
    with tp.attach(model, KINDS[kind]) as attached, stage_results(attached) as results:
        with attached.prompt(len(vision)):
            early = logits_of(model, chunks[0], **{CACHE: cache})
            assert early.shape == (1, 0, 200) and cache.get_seq_length() == gap
            last = logits_of(model, chunks[1], **{CACHE: cache})
        step = logits_of(model, {"input_ids": torch.tensor([[7]])}, **{CACHE: cache})
    plain = tf.DynamicCache(config=model.config.get_text_config())
    with masked_reference(model, vision[None], reference_stages(attached.report, results)):
        expected = logits_of(model, batch, **{CACHE: plain})
        expected_step = logits_of(model, {"input_ids": torch.tensor([[7]])}, **{CACHE: plain})
    assert worst((last[:, -6:], step), (expected[:, -6:], expected_step)) < TOLERANCE
    assert cache.get_seq_length() == len(vision) + 1 and attached.report.prefills == 1


def test_the_last_chunk_has_labels_and_places_of_its_own() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    ids = batch["input_ids"]
    first, last = {"input_ids": ids[:, :30], "pixel_values": batch["pixel_values"]}, ids[:, 30:]
    mask = torch.zeros_like(last, dtype=torch.bool)
    mask[0, [1, 3]] = True
    with tp.attach(model, LATE) as attached, stage_results(attached) as results, torch.no_grad():
        logits = model(**batch).logits
        for asked, expected in (
            ({"logits_to_keep": torch.tensor([1, -2])}, logits[:, [-4, -2]]),
            ({"logits_to_keep": mask}, logits[0, [-4, -2]]),
            ({"logits_to_keep": 99}, logits[:, -5:]),
            ({"logits_to_keep": mask[0], "labels": last[:, [1, 3]]}, logits[:, [-4, -2]]),
            ({"labels": last}, logits),
            ({"labels": last, "shift_labels": torch.cat([last[:, 1:], last[:, :1]], 1)}, logits),
        ):
            cache = tf.DynamicCache(config=model.config.get_text_config())
            with attached.prompt(ids.shape[1]):
                model(**first, **{CACHE: cache})
                output = model(input_ids=last, **{CACHE: cache}, **asked)
            assert worst((output.logits,), (expected,)) < TOLERANCE
            if "labels" in asked:
                rows, follow = logits[:, -5:-1], last[:, 1:]
                if "shift_labels" in asked:
                    rows, follow = logits[:, -5:], asked["shift_labels"]
                elif "logits_to_keep" in asked:
                    rows, follow = logits[:, [-4]], last[:, [3]]
                loss = torch.nn.functional.cross_entropy(rows.flatten(0, 1), follow.flatten())
                assert abs(output.loss - loss) < TOLERANCE
    assert len(results) == 7


def test_a_chunk_of_a_prompt_that_never_ends_is_told() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    ids, cache = batch["input_ids"], tf.DynamicCache(config=model.config.get_text_config())
    first = {"input_ids": ids[:, :30], "pixel_values": batch["pixel_values"]}
    with tp.attach(model, LATE) as attached, attached.prompt(ids.shape[1]):
        with pytest.raises(InputError, match="a chunk that waits for the rest of its prompt has no logits"):
            model(**first, labels=first["input_ids"], **{CACHE: cache})
        logits_of(model, first, **{CACHE: cache})
        with pytest.raises(InputError, match=r"attention_mask of the last chunk: expected \[1, 35 or more\]"):
            model(input_ids=ids[:, 30:], attention_mask=torch.ones(1, 5), **{CACHE: cache})
        with pytest.raises(UnsupportedModelError, match="give every chunk the same cache"):
            logits_of(model, first, use_cache=False)
    lost = tf.DynamicCache(config=model.config.get_text_config())
    with tp.attach(model, LATE) as attached, attached.prompt(ids.shape[1]):
        logits_of(model, first, **{CACHE: lost})
    with pytest.raises(UnsupportedModelError, match="holds back 30 tokens of a prompt in chunks"):
        logits_of(model, {"input_ids": ids[:, 30:]}, **{CACHE: lost})
    assert "forward" not in model.get_decoder().__dict__
