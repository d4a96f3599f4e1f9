"""The report tells what ran: counts, indices, grids; and prints."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, Row, build, inputs, ragged_rows, sizes
from kinds import KINDS, fixed, recipe, stage
from pruned import logits_of

import tokenprune as tp


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_layers(family: str, kind: str) -> None:
    """Counted by a hook of the test's own, behind the engine's."""
    model = build(family)
    batch = inputs(family, model)
    lengths: list[int] = []
    with tp.attach(model, KINDS[kind]) as attached:
        handles = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
            for layer in model.get_decoder().layers
        ]
        logits_of(model, batch)
        for handle in handles:
            handle.remove()
    report = attached.report
    text = batch["attention_mask"].sum(1) - torch.tensor(report.total)
    padding = (batch["attention_mask"] == 0).sum(1)
    entered = (report.vision_tokens + (text + padding)[:, None]).amax(0)
    assert entered.tolist() == lengths
    for reported in report.stages:
        for row, total in enumerate(report.total):
            kept, merged = (index[row][index[row] >= 0] for index in (reported.kept, reported.merged))
            assert len(kept) + len(merged) == reported.sizes[row]
            assert set(kept.tolist()).isdisjoint(merged.tolist())
            assert bool((kept.diff() > 0).all()) and int(kept.max()) < total


def test_places_and_layers() -> None:
    model = build("llava")
    early = stage("after_vision", fixed(0.8), sampler="uniform")
    middle = stage("50%", fixed(0.5), scorer="norm", name="mid")
    asked = recipe("places", early, middle)
    with tp.attach(model, asked) as attached:
        logits_of(model, inputs("llava", model, rows=[Row()]))
    first, second = attached.report.stages
    assert (first.place, first.layer, second.layer, second.name) == ("after_vision", None, 4, "mid")
    assert attached.report.vision_tokens.tolist() == [[20] * 4 + [12] * 4]


def test_grids_of_every_family() -> None:
    for family in FAMILIES:
        model = build(family)
        chosen = sizes(family)
        batch = inputs(family, model, rows=[Row(images=(chosen[0], chosen[-1]), between=2), Row(images=(chosen[-1],))])
        with tp.attach(model, KINDS["after_vision"]) as attached:
            logits_of(model, batch)
        grids = {
            "llava": (((1, 5, 5), (1, 5, 5)), ((1, 5, 5),)),
            # Overview of 2 x 2, then unpadded tiles whose rows end in a newline: 4 x 5, and 2 x 5 of 8 x 14 pixels.
            "llava_next": (((1, 2, 2), (1, 4, 5), (1, 2, 2), (1, 2, 5)), ((1, 2, 2), (1, 2, 5))),
        }.get(family, (((1, 4, 4), (1, 2, 10)), ((1, 2, 10),)))
        assert attached.report.grids == grids, family


def test_it_prints_and_exports() -> None:
    model = build("llava")
    with tp.attach(model, KINDS["merging"]) as attached:
        logits_of(model, inputs("llava", model, rows=ragged_rows("llava")))
    text = str(attached.report)
    assert "sample 1: 50 vision tokens" in text
    assert "before_layer: 1" in text and "12 kept + " in text and "merged" in text
    one, two = text.split("sample 1:")
    assert "in 1 pictures" not in one and "    in 2 pictures: " in two
    data = json.loads(json.dumps(attached.report.to_dict()))
    assert data["vision_tokens"] == attached.report.vision_tokens.tolist()
    assert data["final"] == attached.report.vision_tokens[:, -1].tolist()
    assert data["fingerprint"] == tp.load_recipe(KINDS["merging"]).fingerprint
    kept = attached.report.stages[0].kept[0]
    assert data["stages"][0]["kept"][0] == kept[kept >= 0].tolist()
    assert attached.report.seconds > 0


def test_every_step_without_a_cache_is_a_prefill() -> None:
    model = build("llava")
    with tp.attach(model, KINDS["deep"]) as attached:
        model.generate(**inputs("llava", model), max_new_tokens=3, do_sample=False, use_cache=False)
    assert attached.report.prefills == 3
