"""`tokenprune flops`: its numbers are the ledger's, for every way to name a model, and its mistakes are one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokenprune as tp
from tokenprune import registry
from tokenprune.cost.presets import PRESETS
from tokenprune.families.catalogue import adapters
from tokenprune.families.shape import model_shape
from tokenprune.families.sketch import _widen, sketch_config
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.parts.work import Work
from tokenprune.plot.layers import plot_layers
from tokenprune.recipe import list_recipes, load_recipe


def test_json_is_the_ledger(cli: Callable[..., Any]) -> None:
    ran = cli("flops", "sparsevlm-v1.5", "--variant", "64", "--text", 118, "--question", 40, "--json")
    assert (ran.status, ran.err) == (0, "")
    told = json.loads(ran.out)
    recipe = load_recipe("sparsevlm-v1.5", variant="64")
    expected = tp.ledger("llava-1.5-7b", recipe, text=118, question=40, new_tokens=32).to_dict()
    assert {key: told[key] for key in expected} == expected
    assert (told["fingerprint"], told["grids"], told["plot"]) == (recipe.fingerprint, [[1, 24, 24]], None)


def test_table_has_views_method_and_cache(cli: Callable[..., Any]) -> None:
    out = cli("flops", "fastv", "--keep", "0.5", "--text", "118", "--new-tokens", "8").out
    told = tp.ledger("llava-1.5-7b", "fastv", keep=0.5, text=118, new_tokens=8)
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    for name, view in (("vision tokens only", "papers"), ("whole prompt", "prompt"), ("end to end", "end_to_end")):
        assert f"{told.share(view):.1%}" in lines[name]
    assert all(word in out for word in ("the recipe itself", "scorer", "decoding"))
    assert f"KV cache behind the prefill: 347 → {told.reduced.kv_bytes / 2**20:.4g} MiB" in out
    assert "≈" not in out
    unsure = cli("flops", "sparsevlm").out
    assert "≈" in unsure and "≈100.0%" not in unsure  # the vision tower is certain


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe(name: str, cli: Callable[..., Any]) -> None:
    ran = cli("flops", name, "--model", "qwen2.5-vl-7b", "--grid", "30x40")
    assert (ran.status, ran.err) == (0, "")


@pytest.mark.parametrize("model", ["embedded", *PRESETS])
def test_every_named_model(model: str, cli: Callable[..., Any]) -> None:
    told = json.loads(cli("flops", "uniform", "--model", model, "--keep", "0.25", "--json").out)
    assert told["model"] == model
    assert 0 < told["shares"]["papers"] < told["shares"]["prompt"] < told["shares"]["end_to_end"] < 1


def test_a_folder_needs_no_weights(qwen_folder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "config.json").write_bytes((qwen_folder / "config.json").read_bytes())
    told = json.loads(cli("flops", "none", "--model", tmp_path, "--tokens", "16", "--text", "0", "--json").out)
    linear = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32
    assert told["untouched"]["decoder"] == 4 * (16 * linear + 2 * 16 * 16 * 32)


def test_presets_are_what_configurations_with_these_numbers_give() -> None:
    """Where published configurations leave a number to the class, it is the class's default."""
    from transformers import LlavaConfig, Qwen2_5_VLConfig

    qwen = model_shape(Qwen2_5_VLConfig(vision_config={"hidden_size": 1280}))
    assert qwen.vision == PRESETS["qwen2.5-vl-7b"].vision
    llava = model_shape(LlavaConfig(text_config={"model_type": "llama", "vocab_size": 32064}))
    assert (llava.vision, llava.decoder) == (PRESETS["llava-1.5-7b"].vision, PRESETS["llava-1.5-7b"].decoder)


def test_plot_has_a_bar_for_each_layer(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "layers.png"
    assert json.loads(cli("flops", "fastv", "--save-plot", path, "--json").out)["plot"] == str(path)
    with Image.open(path) as image:
        assert image.size == (1280, 608)
    told = tp.ledger("llava-1.5-7b", "fastv")
    linear, attention, method = plot_layers(told).axes[0].containers
    for row, *bars in zip(told.reduced.rows, linear, attention, method, strict=True):
        own = told.reduced.method if row.layer == 2 else 0
        assert [bar.get_height() for bar in bars] == pytest.approx([row.linear / 1e9, row.attention / 1e9, own / 1e9])
    assert len(plot_layers(tp.ledger("llava-1.5-7b", "none")).axes[0].containers) == 2  # nothing of its own to draw


MISTAKES = [
    ("flops", "missing argument 'recipe'; see tokenprune flops --help"),
    (
        "flops fastv --model llava-1.5-7",
        "no such model folder: llava-1.5-7 (did you mean 'llava-1.5-7b'?); expected 'embedded', "
        + ", ".join(map(repr, PRESETS))
        + ", a folder, or a hub id (owner/name)",
    ),
    ("flops fastv --model TMP/empty", "no model in folder TMP/empty: it has no config.json"),
    ("flops fastv --grid 24", "--grid: expected rows x columns such as 24x24, got '24'"),
    ("flops fastv --grid 24x24 --tokens 500", "--grid 24x24 holds 576 vision tokens, but --tokens is 500"),
    ("flops fastv --text 5 --question 6", "--question 6 is part of --text 5, so it cannot be longer"),
    (
        "flops fastv --keep 1 --final 1",
        "give only one of --keep, --average, --final and --flops: each sets the budget of the whole recipe",
    ),
    ("flops fastv --save-plot TMP/a.jpg", "--save-plot: expected a name that ends in .png, got a.jpg"),
    ("flops fastv --save-plot TMP/none/a.png", "--save-plot: no such folder: TMP/none"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistake(command: str, message: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "empty").mkdir()
    ran = cli(*command.replace("TMP", str(tmp_path)).split())
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.strip() == f"error: {message.replace('TMP', str(tmp_path))}"


def test_another_family_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    ran = cli("flops", "fastv", "--model", tmp_path)
    assert ran.status == 2
    assert "no shape known for idefics3" in ran.err and "write vision_shape" in ran.err


class SilentScorer(NormScorer):
    """A part of somebody else's, which does not say what it costs."""

    def __init__(self) -> None:
        super().__init__()

    def multiply_adds(self, work: Work) -> None:
        return None


class WrongScorer(SilentScorer):
    """One that says something else than it does."""

    def multiply_adds(self, work: Work) -> int:
        return 12345


@contextmanager
def theirs(scorer: type[NormScorer], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """A recipe of one stage with `scorer`, which a plug-in has brought."""
    name = scorer.__name__.removesuffix("Scorer").lower()
    entry = EntryPoint(name=f"scorer.{name}", value=f"theirs:{scorer.__name__}", group=registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: scorer)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])
    registry._declared.cache_clear()
    path = folder / "mine.yaml"
    path.write_text(f"version: 1\nbudget: {{keep: 0.5}}\nstages:\n  - {{place: after_vision, scorer: {name}}}\n")
    try:
        yield path
    finally:
        registry._declared.cache_clear()


def test_verify_finds_a_part_that_says_something_wrong(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its stage and the sum differ, and nothing else; what is not stated at all is no difference."""
    with theirs(WrongScorer, monkeypatch, tmp_path) as path:
        ran = cli("flops", path, "--model", "embedded", "--verify")
    assert ran.status == 1 and "the counters differ from the ledger" in ran.err
    wrong = [line.split("  ")[0] for line in ran.out.splitlines() if line.rstrip().endswith("they differ")]
    assert len(wrong) == 2 and wrong[0].startswith("stage") and wrong[1] == "prefill"
    with theirs(SilentScorer, monkeypatch, tmp_path) as path:
        ran = cli("flops", path, "--model", "embedded", "--verify")
    assert ran.status == 0 and "the ledger does not know what scorer 'silent' costs" in " ".join(ran.out.split())


def test_what_is_not_stated_is_said(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the table, and in one line on stderr where a budget of multiply-adds is solved without it."""
    with theirs(SilentScorer, monkeypatch, tmp_path) as path:
        ran, solved = cli("flops", path), cli("flops", path, "--flops", "0.7")
    assert ran.status == solved.status == 0 and ran.err == ""
    for out in (ran.out, solved.out):
        words = " ".join(out.split())
        assert "Not stated, and in no number above: what scorer 'silent' costs" in words
        assert "not stated" in words.partition("Not stated")[0]  # in the stage's own row, too
    told = solved.err.splitlines()
    assert len(told) == 1 and told[0].startswith("note: mine: what scorer 'silent' costs is not stated")


@pytest.mark.parametrize("recipe", ["none", "sparsevlm"])
def test_verify_shows_counters_beside_the_ledger(recipe: str, cli: Callable[..., Any]) -> None:
    ran = cli("flops", recipe, "--model", "embedded", "--verify", "--text", 30, "--question", 20, "--json")
    assert (ran.status, ran.err) == (0, "")
    told = json.loads(ran.out)["verify"]
    assert told["agrees"] and told["model"] == "embedded"
    pieces = {piece["name"]: piece for piece in told["pieces"]}
    depth = 8
    assert [f"layer {i}" in pieces for i in range(depth + 1)] == [True] * depth + [False]
    assert sum("stage" in name for name in pieces) == (0 if recipe == "none" else 3)
    for name, piece in pieces.items():
        assert piece["torch"] == piece["ledger"] and piece["agrees"]
        hides = "stage" not in name and name != "lm_head"
        assert (piece["torch_sdpa"] < piece["torch"]) == hides  # what PyTorch does not see of SDPA on a CPU
        if name.startswith("layer"):
            assert piece["fvcore"] == pytest.approx(piece["ledger"], rel=0.01)
    assert sum(piece["ledger"] for name, piece in pieces.items() if name != "prefill") == pieces["prefill"]["ledger"]


def test_verify_runs_a_narrow_model_of_the_shape(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small = sketch_config("qwen2.5-vl-7b", layers=4)
    monkeypatch.setattr("tokenprune.study.verify.sketch_config", lambda name, width=None: _scaled(small, width))
    out = cli("flops", "fastv", "--model", "qwen2.5-vl-7b", "--grid", "4x6", "--verify").out
    assert "Counted on qwen2.5-vl-7b with random weights, 256 wide instead of 3584" in out
    assert "layers 1 to 3, each" in out and "PyTorch counts 0 for fused attention (SDPA) on a CPU" in out
    assert "differ" not in out


def _scaled(config: Any, width: int | None) -> Any:
    config = copy.deepcopy(config)
    if width is not None:
        _widen(adapters()[config.model_type], config, width)
    return config
