"""The CPU benchmark's limit, a sequence that is simply cut, does what its numbers are taken to mean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import Row, build, inputs
from kinds import ATTENTION, fixed, recipe, stage
from transformers import StaticCache

import tokenprune as tp
from tokenprune.models.noise import noise, usual_pictures
from tokenprune.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "benchmarks" / "performance"


@pytest.fixture
def benchmark() -> Iterator[ModuleType]:
    """The script's module; scripts import their neighbours by plain names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import cut

        yield cut
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("cut", None)


def test_a_cut_sequence_is_what_a_recipe_leaves_that_keeps_the_last_tokens(benchmark: ModuleType) -> None:
    """Where no text stands before the picture, its last tokens and the text are the last tokens of the sequence."""
    model, other = build("llava"), build("llava")
    batch = inputs("llava", model, rows=[Row(before=0, after=9)])
    chain = recipe("bottom", stage(2, fixed(0.6), scorer="raster"), stage(4, fixed(0.3), scorer="raster"))
    with tp.attach(model, chain) as attached, torch.no_grad():
        kept = model(**batch).logits
    benchmark.cut(other, [int(n) + 9 for n in attached.report.vision_tokens[0]])
    with torch.no_grad():
        simply = other(**batch).logits
    assert (kept - simply).abs().max() < 1e-5


def test_a_cut_sequence_writes_its_cache_into_buffers_of_its_lengths(benchmark: ModuleType) -> None:
    """Compiled prefills write to a static cache; the logits are those without one."""
    model = build("llava")
    batch = inputs("llava", model)
    length = batch["input_ids"].shape[1]
    layers = len(model.model.language_model.layers)
    entering = [length, *[length - 3] * (layers - 1)]
    benchmark.cut(model, entering)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 1)
    with torch.no_grad():
        expected = model(**batch).logits
        static = model(**batch, past_key_values=cache).logits
    assert (static - expected).abs().max() < 1e-5
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + 1 for n in entering]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == entering


def test_lengths_are_those_that_run(benchmark: ModuleType) -> None:
    model = build("llava")
    pictures = usual_pictures(model.config)
    for asked in (
        load_recipe("sparsevlm-v1.5", keep=0.4),
        load_recipe(recipe("one", stage(3, fixed(0.5), raters="last_text", scorer=ATTENTION))),
    ):
        expected = benchmark.lengths(asked, len(model.model.language_model.layers), pictures, text=12)
        with tp.attach(model, asked) as attached, torch.no_grad():
            model(**noise(model, pictures, text=12, batch=1))
        assert [int(n) + 12 for n in attached.report.vision_tokens[0]] == expected
