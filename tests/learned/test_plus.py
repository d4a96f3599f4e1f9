"""The script after GlimpsePrune+: adapters learn from rewards under a recipe, and what is beneath them stays."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenprune.families.chat import Chat
from tokenprune.recipe import load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import training_cases

pytest.importorskip("peft")


def test_adapters_learn_to_answer_from_a_pruned_picture_and_the_model_stays() -> None:
    spec = importlib.util.spec_from_file_location(
        "plus", Path(__file__).parents[2] / "benchmarks" / "learned" / "plus.py"
    )
    assert spec is not None and spec.loader is not None
    plus: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plus)
    model, processor = load_embedded()
    chat = Chat("", plus.adapted(model, 4), processor)
    before = {name: value.clone() for name, value in chat.model.state_dict().items() if "lora" not in name}
    recipe = load_recipe("uniform", keep=4)  # so few tokens that samples differ
    group = plus.Group(chat, recipe, training_cases(2, tasks=["colour", "size"])[:3], 6, seed=0)
    mixed = group.rewards.std(1) > 0
    assert mixed.any(), "some question was answered right and wrong"
    with torch.no_grad():
        first = group.log_probabilities()
    assert torch.equal(first, _without(chat, group)), "adapters begin as nothing"
    weights = [value for value in chat.model.parameters() if value.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=1e-3)
    for _ in range(4):
        optimiser.zero_grad()
        group.loss().backward()
        optimiser.step()
    with torch.no_grad():
        gained = ((group.log_probabilities() - first) * group.said).sum(1).reshape(group.rewards.shape)
    right = group.rewards.bool()
    assert gained[mixed][right[mixed]].mean() > 0 > gained[mixed][~right[mixed]].mean()
    assert all(torch.equal(value, before[name]) for name, value in chat.model.state_dict().items() if name in before)
    assert torch.equal(first, _without(chat, group))


def _without(chat: Chat, group: Any) -> torch.Tensor:
    with torch.no_grad(), chat.model.disable_adapter():
        told: torch.Tensor = group.log_probabilities()
    return told
