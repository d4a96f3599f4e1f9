"""`tokenprune doctor`: what it tells is so, and its status says whether anything stands in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tokenprune.engine import doctor
from tokenprune.recipe import list_recipes


def test_it_tells_versions_and_devices(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("doctor", "--json").out)
    assert told["versions"]["torch"] == version("torch")
    assert told["versions"]["transformers"] == version("transformers")
    assert told["attention"]["sdpa"] is True
    assert told["devices"][0]["name"] == "cpu"
    screen = cli("doctor")
    assert version("torch") in screen.out
    assert screen.out.count("\n") <= 24, "one screen"


def test_it_tries_every_recipe_on_a_model(cli: Callable[..., Any], qwen_folder: Path) -> None:
    told = cli("doctor", qwen_folder, "--json")
    model = json.loads(told.out)["model"]
    assert told.status == 0
    assert (model["supported"], model["model_type"], model["layers"]) == (True, "qwen2_vl", 4)
    assert sorted([*model["runs"], *model["refused"]]) == sorted(list_recipes())
    assert "fastv" in model["runs"]


def test_a_recipe_that_does_not_fit_is_told_with_its_reason(cli: Callable[..., Any], tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = json.loads(cli("doctor", tmp_path, "--json").out)["model"]
    assert told["refused"]["sparsevlm"].startswith("does not fit a model of 1 layers")
    assert "uniform" in told["runs"]
    assert "sparsevlm" in cli("doctor", tmp_path).out
    assert "tokenizer" in told["processor"] or "processor" in told["processor"]


def test_an_unsupported_model_is_no_success(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    told = cli("doctor", tmp_path)
    assert told.status == 1
    assert "bert" in told.out and "nothing known stands in the way" not in told.out
    assert cli("doctor", tmp_path / "nowhere").status == 2


def test_a_version_that_was_never_tried_is_a_conflict(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: ["torch>=99", "nosuchthing>=1", 'extra-only>=1; extra == "x"'])
    told = cli("doctor", "--json")
    found = json.loads(told.out)["conflicts"]
    assert told.status == 1
    assert len(found) == 2
    assert "torch" in found[0] and ">=99" in found[0]
    assert "nosuchthing is not installed" in found[1]
