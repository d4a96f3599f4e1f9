"""Recipes that read the vision tower, on models with and without a class token: exact, and told what stands in."""

from __future__ import annotations

import pytest
import torch
from families import build, inputs
from pruned import TOLERANCE, logits_of, run_both

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError

BY_CLASS_TOKEN = [
    *["fastervlm", "visionzip", "vispruner", "vscan", "prumerge", "prumerge-plus"],
    *["scope", "holov", "prunesid"],
]
QWEN = [("vscan", "qwen"), ("hiprune", "qwen")]


@pytest.mark.parametrize("name", BY_CLASS_TOKEN)
def test_without_a_class_token_received_attention_stands_in_and_the_report_says_so(name: str) -> None:
    with_one, without = build("llava"), build("qwen2_5_vl")
    with tp.attach(with_one, name, keep=0.4) as attached:
        assert attached.report.notes == ()
    batch = inputs("qwen2_5_vl", without)
    with tp.attach(without, name, keep=0.4) as attached:
        logits_of(without, batch)
        kept, notes = attached.report.stages[0].kept, attached.report.notes
    told = [note for note in notes if "no class token; received_attention of block" in note]
    recipe = tp.load_recipe(name, keep=0.4)
    reads = recipe.build_stages()[0].reads.tower
    assert len(told) == sum(signal.startswith("class_attention") for signal in reads)
    stage = recipe.to_dict()["stages"][0]
    by_received = {**stage["scorer"], "type": "received_attention"}
    stages = [{**stage, "scorer": by_received}, *recipe.to_dict()["stages"][1:]]
    with tp.attach(without, {**recipe.to_dict(), "stages": stages}) as attached:
        logits_of(without, batch)
        assert torch.equal(attached.report.stages[0].kept, kept)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("name", "variant"), QWEN)
def test_the_forms_for_qwen_are_exact_and_read_what_a_qwen_has(family: str, name: str, variant: str) -> None:
    model = build(family)
    recipe = tp.load_recipe(name, variant=variant, keep=0.4)
    difference, (got, expected), report = run_both(model, inputs(family, model), recipe)
    assert torch.equal(got, expected) and difference < TOLERANCE
    assert report.notes == ()
    assert bool((report.vision_tokens[:, -1] < torch.tensor(report.total)).all())


@pytest.mark.parametrize("name", [*BY_CLASS_TOKEN, "hiprune"])
def test_a_tower_that_nobody_has_held_against_eager_attention_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.families.adapter.PROVED", frozenset())
    with pytest.raises(UnsupportedModelError, match=r"vision tower of LLaVA"):
        tp.attach(build("llava"), name)
