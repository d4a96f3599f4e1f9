"""Hooks on decoder layers are there when they have something to do, and not in other steps of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, Row, build, inputs, next_turn
from kinds import KINDS, fixed, recipe, stage
from pruned import worst
from reference import generate_logits

import tokenprune as tp
from tokenprune.engine.hooks import LayerHooks

RECIPES = {
    **{kind: KINDS[kind] for kind in ("after_vision", "attention", "merging")},
    "renumbered": recipe("renumbered", stage(2, fixed(0.4), scorer="random", positions="renumber")),
}


def hooked(model: Any) -> set[int]:
    """Layers with hooks on them or on their projections, the first layer's own hook left out."""
    found = set()
    for index, layer in enumerate(model.get_decoder().layers):
        hooks = max(0, len(layer._forward_pre_hooks) - (index == 0))
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj)
        if hooks + sum(len(module._forward_hooks) for module in projections):
            found.add(index)
    return found


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_has_a_hook_while_it_decodes_without_a_mask(family: str, kind: str) -> None:
    model = build(family)
    batch = inputs(family, model, rows=[Row()])
    with tp.attach(model, RECIPES[kind]):
        assert hooked(model)
        model.generate(**batch, max_new_tokens=1)
        assert hooked(model), "a prefill ends with them"
        model.generate(**batch, max_new_tokens=2)
        assert not hooked(model)
        model.generate(**inputs(family, model), max_new_tokens=2)
        assert hooked(model), "a batch with padding decodes with a mask, and with them"
    assert not hooked(model)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_with_hooks_that_stay(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go while the first answer is decoded, and come back for the mask of a second turn on its cache."""
    model = build(family)
    answers = []
    for staying in (False, True):
        batch = inputs(family, model, rows=[Row()])
        with tp.attach(model, RECIPES[kind]), monkeypatch.context() as patch:
            if staying:
                patch.setattr(LayerHooks, "unmount", lambda self: None)
            first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            assert bool(hooked(model)) == staying
            following = next_turn(batch, first.sequences)
            answers.append(generate_logits(model, {**following, CACHE: first[CACHE]}))
            patch.undo()
    (tokens, logits), (others, other_logits) = answers
    assert torch.equal(tokens, others)
    assert worst(logits, other_logits) == 0.0


def test_other_hooks_see_what_the_layer_sees() -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    seen: list[int] = []
    layer = model.get_decoder().layers[3]
    see = lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None).shape[1])  # noqa: E731
    with layer.register_forward_pre_hook(see, with_kwargs=True), tp.attach(model, KINDS["after_vision"]):
        for _ in range(2):  # the second prefill finds the hooks of the first gone
            model.generate(**batch, max_new_tokens=2)
    pruned = seen[0]
    assert pruned < batch["input_ids"].shape[1]
    assert seen == [pruned, 1, pruned, 1]
