"""The CPU benchmark is what its numbers are taken to mean: its limit, a sequence that is simply cut, and its rounds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch
from families import CACHE, Row, build, inputs
from kinds import ATTENTION, fixed, recipe, stage
from transformers import StaticCache

import tokenprune as tp
from tokenprune.families.noise import noise, usual_pictures
from tokenprune.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "benchmarks" / "performance"


@pytest.fixture
def cells() -> Iterator[ModuleType]:
    """The scripts' module; they import their neighbours by plain names."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("cells")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("cells", "cut"):
            sys.modules.pop(name, None)


def test_a_cut_sequence_is_what_a_recipe_leaves_that_keeps_the_last_tokens(cells: ModuleType) -> None:
    """Where no text stands before the picture, its last tokens and the text are the last tokens of the sequence."""
    model, other = build("llava"), build("llava")
    batch = inputs("llava", model, rows=[Row(before=0, after=9)])
    chain = recipe("bottom", stage(2, fixed(0.6), scorer="raster"), stage(4, fixed(0.3), scorer="raster"))
    with tp.attach(model, chain) as attached, torch.no_grad():
        kept = model(**batch).logits
    cells.cut(other, [int(n) + 9 for n in attached.report.vision_tokens[0]])
    with torch.no_grad():
        simply = other(**batch).logits
    assert (kept - simply).abs().max() < 1e-5


def test_a_cut_sequence_writes_its_cache_into_buffers_of_its_lengths(cells: ModuleType) -> None:
    """Compiled prefills write to a static cache; the logits are those without one."""
    model = build("llava")
    batch = inputs("llava", model)
    length = batch["input_ids"].shape[1]
    layers = len(model.model.language_model.layers)
    entering = [length, *[length - 3] * (layers - 1)]
    cells.cut(model, entering)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 1)
    with torch.no_grad():
        expected = model(**batch).logits
        static = model(**batch, **{CACHE: cache}).logits
    assert (static - expected).abs().max() < 1e-5
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + 1 for n in entering]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == entering


def test_lengths_are_those_that_run(cells: ModuleType) -> None:
    model = build("llava")
    pictures = usual_pictures(model.config)
    for asked in (
        load_recipe("sparsevlm-v1.5", keep=0.4),
        load_recipe(recipe("one", stage(3, fixed(0.5), raters="last_text", scorer=ATTENTION))),
    ):
        expected = cells.lengths(asked, len(model.model.language_model.layers), pictures, text=12)
        with tp.attach(model, asked) as attached, torch.no_grad():
            model(**noise(model, pictures, text=12, batch=1))
        assert [int(n) + 12 for n in attached.report.vision_tokens[0]] == expected


def test_later_rounds_join_the_earlier_ones(cells: ModuleType) -> None:
    model = build("llava")
    tokens = usual_pictures(model.config).tokens
    sides = {"few": load_recipe("fastv", keep=0.3)}
    measured = partial(cells.compare, model, sides, tokens=tokens, text=12, limits=("prefill", "language"))
    first = measured(rounds=1)
    untouched, few = measured(rounds=2, earlier=first)
    for before, row in zip(first, (untouched, few), strict=True):
        assert row["samples"][:1] == before["samples"]
        assert len(row["samples"]) == 3
    assert len(few["machine"]["language"]["samples"]) == 3
    limit = few["machine"]["prefill"]
    free, own, usual = limit["samples"], *([s["prefill"] for s in r["samples"]] for r in (few, untouched))
    assert free[:1] == first[1]["machine"]["prefill"]["samples"]
    assert limit["allows"]["value"] == median(u / f for u, f in zip(usual, free, strict=True))
    assert limit["reached"]["value"] == median(f / o for f, o in zip(free, own, strict=True))
    assert few["speedup"]["prefill"]["value"] == median(u / o for u, o in zip(usual, own, strict=True))


def test_a_cache_takes_the_bytes_that_the_ledger_tells(cells: ModuleType) -> None:
    model = build("llava")
    tokens = usual_pictures(model.config).tokens
    sides = {name: load_recipe(name, keep=0.3) for name in ("fastv", "sparsevlm-v1.5")}
    for row in cells.compare(model, sides, tokens=tokens, text=12, batch=2, rounds=1, cache=True):
        assert row["cache_bytes"]["measured"] == row["cache_bytes"]["ledger"] > 0
