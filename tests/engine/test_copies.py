"""Copies and pickles of an attached model come without a trace of the recipe."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, build, inputs
from kinds import KINDS
from pruned import logits_of, snapshot
from torch import nn

import tokenprune as tp

ATTENTION = KINDS["attention"]
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "inside a wrapper": lambda model: copy.deepcopy(nn.ModuleDict({"model": model}))["model"],
}


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_no_trace_and_works_by_itself(family: str, way: str) -> None:
    model, untouched = build(family, layers=6), build(family, layers=6)
    batch = inputs(family, model)
    with tp.attach(model, ATTENTION) as attached:
        twin = WAYS[way](model)
        assert snapshot(twin) == snapshot(untouched)
        pruned = logits_of(model, batch)
        assert attached.report.vision_tokens[0, -1] < attached.report.total[0]
        plain = logits_of(untouched, batch)
        assert torch.equal(logits_of(twin, batch), plain)
        assert torch.equal(twin.generate(**batch, **GREEDY), untouched.generate(**batch, **GREEDY))
        with torch.no_grad():
            for weight in twin.parameters():
                weight.zero_()
        assert torch.equal(logits_of(model, batch), pruned)
        with tp.attach(WAYS[way](untouched) if way == "deepcopy" else build(family, layers=6), ATTENTION) as other:
            assert torch.equal(logits_of(other.anatomy.model, batch), pruned)
    assert torch.equal(logits_of(model, batch), plain)


@pytest.mark.parametrize("path", ["model", "model.language_model", "model.language_model.layers.2"])
def test_a_copy_of_a_part_has_no_trace(path: str) -> None:
    model, untouched = build("qwen3_vl", layers=6), build("qwen3_vl", layers=6)
    with tp.attach(model, ATTENTION):
        twin = copy.deepcopy(model.get_submodule(path))
    assert snapshot(twin) == snapshot(untouched.get_submodule(path))


def test_hooks_and_attributes_of_others_are_copied() -> None:
    model = build("llava", layers=6)
    model.get_decoder().layers[2].register_forward_pre_hook(print)
    model.generate = own = print
    with tp.attach(model, ATTENTION):
        twin = copy.deepcopy(model)
    assert list(twin.get_decoder().layers[2]._forward_pre_hooks.values()) == [print]
    assert twin.generate is own and model.generate is own


def test_a_copy_of_a_compiled_model_has_no_trace() -> None:
    model, untouched = build("llava", layers=6), build("llava", layers=6)
    with tp.attach(model, ATTENTION, compile={"backend": "eager"}):
        assert snapshot(copy.deepcopy(model)) == snapshot(untouched)
    assert snapshot(model) == snapshot(untouched)


def test_a_state_of_the_instances_own_is_kept() -> None:
    """`__getstate__` of a module may be somebody else's already."""
    model = build("llava", layers=6)
    layer = model.get_decoder().layers[2]
    layer.__getstate__ = own = lambda: {**vars(layer), "mark": 1}
    with tp.attach(model, ATTENTION):
        twin = copy.deepcopy(layer)
    assert (twin.mark, len(twin._forward_pre_hooks)) == (1, 0)
    assert layer.__getstate__ is own


def test_reports_and_caches_are_copied() -> None:
    model = build("llava", layers=6)
    batch = inputs("llava", model)
    step = {"input_ids": torch.tensor([[7], [8]])}
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    with torch.no_grad(), tp.attach(model, ATTENTION) as attached:
        cache = model(**batch, use_cache=True)[CACHE]
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        reports = [copy.deepcopy(attached.report), pickle.loads(pickle.dumps(attached.report))]
        expected = model(**step, attention_mask=mask, **{CACHE: cache}).logits
        for each in copies:
            assert torch.equal(model(**step, attention_mask=mask, **{CACHE: each}).logits, expected)
        for report in reports:
            assert report.to_dict() == attached.report.to_dict()
