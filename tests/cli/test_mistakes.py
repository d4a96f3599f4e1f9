"""Every mistake of a user ends in one clear message on stderr, status 2, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PLACES = ("IMAGE", "TMP")

MISTAKES = [
    # pictures
    ("run --image TMP/none.png --question x", "--image: no such file: TMP/none.png"),
    ("run --image TMP --question x", "--image: TMP is a folder; expected a picture file"),
    ("run --image TMP/text.png --question x", "--image: TMP/text.png is not a picture that Pillow can read"),
    (
        "run --image TMP/cut.png --question x",
        "--image: TMP/cut.png is damaged: image file is truncated",
    ),
    ("run --image IMAGE", "a picture needs a question: tokenprune run photo.jpg 'What is this?'"),
    ("run --image IMAGE --question ''", "--question is empty"),
    # budgets
    ("run --keep 0", "--keep: keep as a count must be at least 1, got 0"),
    ("run --keep -3", "--keep: keep as a count must be at least 1, got -3"),
    (
        "run --keep 1.5",
        "--keep: keep as a share must lie in (0, 1], got 1.5 (write a count without a decimal point)",
    ),
    ("run --keep nan", "--keep: keep as a share must lie in (0, 1], got nan (write a count without a decimal point)"),
    ("run --keep lots", "--keep: expected a count such as 64 or a share such as 0.33, got 'lots'"),
    ("run --final ''", "--final: expected a count such as 64 or a share such as 0.33, got ''"),
    (
        "run --keep 64 --average 64",
        "give only one of --keep, --average, --final and --flops: each sets the budget of the whole recipe",
    ),
    ("show none --keep 0.5", "budget keep: 0.5: this recipe has no stages, so it keeps all 576 vision tokens"),
    # models
    (
        "run --model embeded",
        "no such model folder: embeded (did you mean 'embedded'?); "
        "expected 'embedded', a folder, or a hub id (owner/name)",
    ),
    (
        "run --model TMP/none",
        "no such model folder: TMP/none; expected 'embedded', a folder, or a hub id (owner/name)",
    ),
    ("run --model TMP/empty", "no model in folder TMP/empty: it has no config.json"),
    (
        "run --model nobody/nothing",
        "no such model folder: nobody/nothing; as a hub id it is not cached and the hub is out of reach",
    ),
    (
        "run --dtype float23",
        "--dtype: expected float32, bfloat16 or float16, got 'float23' (did you mean 'float32'?)",
    ),
    ("run --device gpu", "device: expected cpu, cuda, cuda:0 or mps, got 'gpu'"),
    ("run --attention flash", "--attention: expected sdpa or eager, got 'flash'"),
    (
        "run --max-new-tokens 0",
        "invalid value for '--max-new-tokens': Input should be greater than or equal to 1; see tokenprune run --help",
    ),
    # files to write
    ("run --save-plot TMP/none/out.png", "--save-plot: no such folder: TMP/none"),
    ("run --save-plot TMP", "--save-plot: TMP is a folder; expected a file name"),
    ("run --save-plot TMP/out.jpg", "--save-plot: expected a name that ends in .png, got out.jpg"),
    ("schema --output TMP/none/out.json", "--output: no such folder: TMP/none"),
    ("new TMP/none/out.yaml", "FILE: no such folder: TMP/none"),
    ("new TMP/text.png", "TMP/text.png exists; --force overwrites it"),
    # shapes
    ("show fastv --grid 24", "--grid: expected rows x columns such as 24x24, got '24'"),
    ("show fastv --grid 24x24 --tokens 500", "--grid 24x24 holds 576 vision tokens, but --tokens is 500"),
    ("show fastv --yaml --json", "give only one of --yaml and --json"),
    # usage
    ("rnu", "no such command 'rnu' (did you mean 'run'?); see tokenprune --help"),
    ("run --imag x", "no such option: --imag (did you mean --image?); see tokenprune run --help"),
    ("show fastv surplus", "got unexpected extra argument(s) (surplus); see tokenprune show --help"),
    ("run --image", "option '--image' requires an argument"),
    ("show", "missing argument 'recipe'; see tokenprune show --help"),
    ("check", "missing argument 'FILE...'; see tokenprune check --help"),
    ("check x.yaml --format xml", "--format: expected text, json or github, got 'xml'"),
    ("ls 'nothing*'", "no recipe matches 'nothing*'; see `tokenprune ls recipes`"),
    ("ls fastvv", "no recipe matches 'fastvv' (did you mean 'fastv'?); see `tokenprune ls recipes`"),
    ("ls part 'x*'", "expected recipes, parts, models before a pattern, got 'part' (did you mean 'parts'?)"),
]

RECIPES = [
    ("run --recipe TMP/none.yaml", "TMP/none.yaml: error: no such file"),
    ("show TMP/empty/", "TMP/empty: error: this is a folder, expected a recipe file"),
    ("show fastv --variant k9", "--variant:1:1: error: no variant 'k9'"),
    ("run --set oops", "--set:1:1: error: expected PATH=VALUE, for example stages.0.scheduler.keep=64"),
    ("run --set stages.7.sampler=top_k", "--set:1:8: error: "),
    ("new --from fastvv", "fastvv: error: no recipe 'fastvv' comes with tokenprune (did you mean 'fastv'?); known: "),
    (
        "run --recipe sparsvlm",
        "sparsvlm: error: no recipe 'sparsvlm' comes with tokenprune (did you mean 'sparsevlm'?)",
    ),
]
"""These begin like this; the recipe package tests the rest of its reports."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the mistakes are about."""
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("this is text")
    (tmp_path / "empty").mkdir()
    return tmp_path


def words(command: str, folder: Path) -> list[str]:
    import shlex

    filled = command.replace("TMP", str(folder)).replace("IMAGE", str(folder / "whole.png"))
    return shlex.split(filled)


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistake(command: str, message: str, folder: Path, cli: Callable[..., Any]) -> None:
    before = sorted(folder.rglob("*"))
    outcome = cli(*words(command, folder))
    assert outcome.err == "error: " + message.replace("TMP", str(folder)) + "\n"
    assert (outcome.status, outcome.out) == (2, "")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("command", "start"), RECIPES, ids=[command for command, _ in RECIPES])
def test_mistake_in_a_recipe(command: str, start: str, folder: Path, cli: Callable[..., Any]) -> None:
    outcome = cli(*words(command, folder))
    assert outcome.err.startswith(start.replace("TMP", str(folder)))
    assert (outcome.status, outcome.out) == (2, "")


def test_all_problems_of_a_recipe_are_told_at_once(folder: Path, cli: Callable[..., Any]) -> None:
    path = folder / "bad.yaml"
    path.write_text("version: 1\nstages:\n  - place: {before_layer: -1}\n    smapler: top_k\n    scorer: atention\n")
    outcome = cli("run", "--recipe", path)
    assert (outcome.status, outcome.out) == (2, "")
    heads = [line for line in outcome.err.splitlines() if ": error: " in line]
    assert [head.removeprefix(str(path)).split(" error: ")[0] for head in heads] == [":3:27:", ":4:5:", ":5:13:"]


def test_mistakes_are_told_before_a_model_is_loaded(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tokenprune.scenes.load_embedded", load)
    assert cli("run", "--keep", "2.0").status == 2
    assert cli("run", "--recipe", "nothing").status == 2
    assert cli("run", "--save-plot", "/nowhere/x.png").status == 2
