"""Gradients through an attached model whose layers run again in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Batch, build, inputs
from kinds import KINDS, fixed, recipe, stage
from torch import Tensor

import tokenprune as tp

BIASED = recipe(
    "biased",
    stage(
        2,
        fixed(0.5),
        raters="above_mean",
        scorer={"type": "attention"},
        recycler={"type": "cluster", "share": 0.5, "per_cluster": 3},
        rectifier="log_mass",
    ),
)
RECIPES: dict[str, dict[str, Any]] = {**KINDS, "biased": BIASED}


def gradients(model: Any, batch: Batch, recipe: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Of the pixels, and of the weights of the second decoder layer."""
    model.zero_grad()
    pixels = batch["pixel_values"].clone().requires_grad_()
    with tp.attach(model, recipe):
        logits = model(**{**batch, "pixel_values": pixels}, **options).logits
        logits[:, -3:].square().sum().backward()
    return pixels.grad, [weight.grad.clone() for weight in model.get_decoder().layers[1].parameters()]


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_checkpointing(family: str, reentrant: bool) -> None:
    model = build(family).train()
    batch = inputs(family, model)
    names = list(RECIPES) if family == "llava" else ["biased"]
    plain = {name: gradients(model, batch, RECIPES[name]) for name in names}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, (pixels, weights) in plain.items():
        again, ours = gradients(model, batch, RECIPES[name])
        assert pixels.abs().sum() > 0
        torch.testing.assert_close(again, pixels, msg=name)
        torch.testing.assert_close(ours, weights, msg=name)
