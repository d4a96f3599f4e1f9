"""Tensor parallel: two processes keep what one keeps; and continuous batching, where refusals must reach the caller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build, inputs, text_only_inputs
from kinds import KINDS
from transformers import ContinuousBatchingConfig

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError


def test_two_processes_keep_and_answer_what_one_does(tmp_path: Path) -> None:
    """Heads are spread over the processes; raters, scores of each head and their mean, gravity, counts that depend on
    scores, plain and grouped queries with biases."""
    script = Path(__file__).with_name("two_processes.py")
    ran = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(2)]
    assert [each.wait(240) for each in ran] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    uneven, compiled = ranks[0].pop("refusals")
    assert "2 processes share 1 heads (num_key_value_heads) unevenly" in uneven
    assert "attach(compile=True): the model is spread over 2 processes" in compiled
    for family, sides in ranks[0].items():
        for recipe, one in sides["one"].items():
            for rank in ranks:
                two = rank[family]["two"][recipe]
                assert all(map(torch.equal, two["kept"], one["kept"])), (family, recipe)
                assert torch.allclose(two["logits"], one["logits"], atol=1e-4), (family, recipe)
                assert torch.equal(two["answer"], one["answer"])


def test_continuous_batching_refuses_pictures_where_they_are_handed_in() -> None:
    """In the caller's thread: what its own thread raises, transformers swallows. Detached, nothing of it is left."""
    model = build("llava", layers=2)
    shows, tells = inputs("llava", model)["input_ids"][0].tolist(), text_only_inputs("llava", model)["input_ids"]
    manager = None
    with tp.attach(model, KINDS["after_vision"]):
        with pytest.raises(UnsupportedModelError, match=r"generate_batch.*vision tokens, and the attached recipe"):
            model.generate_batch([tells[1].tolist(), shows])
        manager = model.init_continuous_batching()
        with pytest.raises(UnsupportedModelError, match="'after_vision' cannot shorten"):
            manager.add_request(shows)
    assert "add_request" not in vars(manager)
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(model))
    with tp.attach(model, "none"):
        assert "generate_batch" not in vars(model)  # nothing is shortened


def test_continuous_batching_of_text_runs_as_if_nothing_were_attached() -> None:
    model = build("llava", layers=2)
    prompts = text_only_inputs("llava", model, lengths=(6, 6))["input_ids"].tolist()

    def answers() -> list[list[int]]:
        room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
        made = model.generate_batch(prompts, max_new_tokens=3, continuous_batching_config=room, warmup=False)
        return [each.generated_tokens for each in made.values()]

    plain = answers()
    with tp.attach(model, KINDS["after_vision"]):
        assert answers() == plain
    assert [len(answer) for answer in plain] == [3, 3]
