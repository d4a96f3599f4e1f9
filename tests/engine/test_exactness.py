"""The law: a pruned model answers what the unpruned one answers when the dropped tokens are hidden by the mask.

Beside test_matrix.py, which holds every family to it in every way to generate: padding, turns, raters, caches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, Row, build, inputs, ragged_rows, row_inputs, sizes, vision_mask
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, stage_results, two_turns, worst
from reference import generate_logits, masked_reference, pruned_difference

import tokenprune as tp
from tokenprune.parts.raters.text import AboveMeanRaters

ATTENTIONS = ("sdpa", "eager")


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_equals_the_masked_reference_with_padding_on_either_side(family: str, kind: str, side: Any) -> None:
    model = build(family)
    batch = inputs(family, model, side=side)
    vision = vision_mask(model, batch["input_ids"])
    with tp.attach(model, KINDS[kind]) as attached, stage_results(attached) as results:
        logits = logits_of(model, batch)
    stages = reference_stages(attached.report, results)
    with masked_reference(model, vision, stages):
        expected = logits_of(model, batch)
    last = stages[-1]
    kept = attached.report.stages[-1].kept
    assert logits.shape[1] < expected.shape[1]
    assert pruned_difference(logits, expected, vision, batch["attention_mask"], kept, last.anchors) < TOLERANCE


@pytest.mark.parametrize("kind", ["attention", "adaptive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_never_rates(family: str, kind: str) -> None:
    """On the right it stands behind the image, where raters are looked for."""
    model = build(family)
    rows = [Row(after=5), Row(after=14)]
    kept = []
    for side in ("left", "right"):
        with tp.attach(model, KINDS[kind]) as attached:
            logits_of(model, inputs(family, model, rows=rows, side=side))
        kept.append([stage.kept.tolist() for stage in attached.report.stages])
    assert kept[0] == kept[1]


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("kind", ["attention", "adaptive"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_of_text_on_the_same_cache_equals_the_masked_reference(
    family: str, attention: Any, kind: str
) -> None:
    model = build(family, attention=attention)
    (sequences, logits), (wanted, expected), report = two_turns(model, inputs(family, model), KINDS[kind])
    assert torch.equal(sequences, wanted)
    assert worst(logits, expected) < TOLERANCE
    assert report.prefills == 1


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_equals_the_sample_alone(family: str, kind: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[*ragged_rows(family), Row(before=1, after=4)])
    with tp.attach(model, KINDS[kind]) as attached:
        sequences, logits = generate_logits(model, batch)
        together = attached.report.stages
        for row in range(3):
            alone = row_inputs(batch, row)
            single, single_logits = generate_logits(model, alone)
            for stage, both in zip(attached.report.stages, together, strict=True):
                assert both.kept[row][both.kept[row] >= 0].tolist() == stage.kept[0].tolist()
                assert both.merged[row][both.merged[row] >= 0].tolist() == stage.merged[0].tolist()
            assert torch.equal(sequences[row, -6:], single[0, -6:])
            assert worst(tuple(step[row : row + 1] for step in logits), single_logits) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_votes_of_a_row_are_those_of_the_sample_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tell more than the raters and tokens that they lead to: padding must not vote, nor be voted for."""
    seen: list[torch.Tensor] = []
    shares = AboveMeanRaters.shares
    monkeypatch.setattr(
        AboveMeanRaters, "shares", lambda self, tokens: (seen.append(shares(self, tokens)), seen[-1])[1]
    )
    model = build(family)
    batch = inputs(family, model, rows=[*ragged_rows(family), Row(before=1, after=4)])
    with tp.attach(model, "sparsevlm-v1.5", keep=0.5):
        logits_of(model, batch)
        for row in range(3):
            logits_of(model, row_inputs(batch, row))
    together, *each = seen
    for row, alone in enumerate(each):
        texts = alone.shape[1]
        assert (together[row, texts:] == 0).all()
        assert (together[row, :texts] - alone[0]).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_raters_are_the_prompts_text_however_often_it_is_read(family: str, options: dict[str, Any]) -> None:
    """Without a cache every step reads prompt and answer anew: the answer must not start to rate."""
    model = build(family)
    batch = inputs(family, model)
    kept = []
    with tp.attach(model, KINDS["attention"]) as attached:
        logits_of(model, batch)
        kept.append([stage.kept for stage in attached.report.stages])
        generate_logits(model, batch, **options)
        kept.append([stage.kept for stage in attached.report.stages])
    for first, second in zip(*kept, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_decoding_gives_the_greedy_answer(family: str) -> None:
    """It reads candidate tokens with the prompt, and crops the cache when they are wrong."""
    model = build(family)
    batch = row_inputs(inputs(family, model, rows=[Row(after=12)]), 0)
    with tp.attach(model, KINDS["attention"]):
        greedy = model.generate(**batch, max_new_tokens=12, do_sample=False)
        looked_up = model.generate(**batch, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, looked_up)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_image_in_the_second_turn_is_pruned_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the cache of the first turn, which keeps what it holds; raters read their own turn's keys out of it."""
    model = build(family)
    size = sizes(family)[0]
    one = inputs(family, model, rows=[Row(images=(size,))])
    both = inputs(family, model, rows=[Row(images=(size, size), between=7)])
    length = one["input_ids"].shape[1]
    stages = recipe(
        "two-images",
        stage(2, fixed(0.5), scorer="random"),
        stage(4, fixed(0.4), raters="above_mean", scorer="attention"),
        stage(6, fixed(0.2), scorer="norm"),
    )

    def turns(first: dict[str, Any], second: dict[str, Any]) -> torch.Tensor:
        cache = model(**first, use_cache=True)[CACHE]
        return model(**second, **{CACHE: cache}).logits

    # The first turn is the beginning of `both`; the second brings the rest, with the second image's pixels.
    first = {k: v[:, :length] for k, v in both.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    second = {k: v[:, length:] for k, v in both.items() if k in ("input_ids", "mm_token_type_ids")}
    second["attention_mask"] = both["attention_mask"]
    halves = {k: (v[: len(v) // 2], v[len(v) // 2 :]) for k, v in both.items() if k not in first}
    first |= {k: v[0] for k, v in halves.items()}
    second |= {k: v[1] for k, v in halves.items()}
    if "mm_token_type_ids" in first:
        positions = model.model.get_rope_index(
            both["input_ids"],
            both["mm_token_type_ids"],
            image_grid_thw=both["image_grid_thw"],
            attention_mask=both["attention_mask"],
        )[0]
        first["position_ids"], second["position_ids"] = positions[..., :length], positions[..., length:]
    with torch.no_grad(), tp.attach(model, stages) as attached:
        logits = turns(first, second)
        assert attached.report.prefills == 2
    n = attached.report.total[0]
    vision = vision_mask(model, both["input_ids"])
    with torch.no_grad(), tp.attach(model, stages) as attached:
        model(**first)
        kept = [s.kept for s in attached.report.stages]
    with torch.no_grad(), tp.attach(model, stages) as attached:
        turns(first, second)
        judged = attached.report.stages[1].scores
        kept = [torch.cat([a, b.kept + n], dim=1) for a, b in zip(kept, attached.report.stages, strict=True)]
    with monkeypatch.context() as patch, torch.no_grad(), tp.attach(model, stages) as attached:
        patch.setattr("tokenprune.engine.projections.written_keys", lambda *_: None)
        turns(first, second)
        assert torch.equal(judged, attached.report.stages[1].scores), "as from keys that are turned once more"
    with torch.no_grad(), masked_reference(model, vision, list(zip([2, 4, 6], kept, strict=True))):
        expected = turns(first, second)
    assert (logits[:, -1] - expected[:, -1]).abs().max() < TOLERANCE
