"""`tokenprune doctor`: what it tells is so, and its status says whether anything stands in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_a_torchvision_of_another_build_is_named_by_every_command(tmp_path: Path) -> None:
    """pip may bring one beside a CPU build of torch, and transformers cannot be imported then."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])

    def tokenprune(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tokenprune.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})

    asked = tokenprune("run")
    assert asked.returncode == 1 and asked.stderr.count("\n") == 1
    assert "torchvision 0.28.0 does not go with torch" in asked.stderr
    told = tokenprune("doctor", "embedded", "--json")
    assert told.returncode == 1 and "embedded is not looked at" in told.stderr
    (conflict,) = [each for each in json.loads(told.stdout)["conflicts"] if "torchvision" in each]
    assert "uninstall it" in conflict
