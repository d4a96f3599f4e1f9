"""The short profile of what benchmarks/reliability/fuzz.py does at length: docs/reliability.md."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Row, inputs
from fuzzing.drawing import broken, drawn
from fuzzing.files import one_file, one_picture
from fuzzing.prompts import model_of, one_prompt
from fuzzing.recipes import a_text, check_any, check_runs, check_text
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS
from pruned import TOLERANCE, run_both

import tokenprune as tp
from tokenprune.cli.question_file import read_cases
from tokenprune.errors import InputError
from tokenprune.recipe import Recipe

randoms = st.randoms(use_true_random=False)


@settings(max_examples=40)
@given(randoms)
def test_a_right_recipe_survives_and_runs_with_exact_counts(rng: random.Random) -> None:
    recipe = check_any(drawn(rng))
    if isinstance(recipe, Recipe):
        with torch.no_grad():
            check_runs(recipe, rng)


@settings(max_examples=50)
@given(randoms)
def test_a_broken_recipe_is_refused_with_a_place_or_runs(rng: random.Random) -> None:
    recipe = check_any(broken(rng))
    if isinstance(recipe, Recipe):
        with torch.no_grad():
            check_runs(recipe, rng)


@settings(max_examples=40)
@given(randoms)
def test_a_changed_text_is_refused_with_a_place_or_loads(rng: random.Random) -> None:
    check_text(a_text(rng))


@settings(max_examples=12)
@given(randoms)
@torch.no_grad()
def test_a_prompt_equals_the_masked_reference_and_each_sample_alone(rng: random.Random) -> None:
    one_prompt(rng)


@settings(max_examples=40)
@given(randoms)
def test_a_question_file_is_read_or_refused_in_one_line_a_mistake(rng: random.Random) -> None:
    one_file(rng)


@settings(max_examples=40)
@given(randoms)
def test_a_picture_is_opened_or_refused_in_one_line(rng: random.Random) -> None:
    one_picture(rng)


# ------------------------------------------------------------------------------------------- what long runs have found


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[" * 5000, "not JSON: maximum recursion depth"),
        ('"ye\x85s"', r'got "ye\x85s"'),
        ('{"image": "a\\nb.png", "question": "What?", "answer": "yes"}', r"a\nb.png"),
        (json.dumps({"image": "a" * 300, "question": "What?", "answer": "yes"}), "too long"),
    ],
    ids=["nested", "a line break", "a line break in a name", "a name too long"],
)
def test_question_files(line: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(line + "\n[]\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_cases(file, tmp_path)
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{file}:1: error: ") and told in first
    assert second.startswith(f"{file}:2: error: expected an object")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_on_a_static_cache(family: str, attention: Any) -> None:
    """Without padding, SDPA's first chunk has no mask and the others have; Qwen's come by kind of layer."""
    model = model_of(family, attention)
    for rows in ([Row()], [Row(), Row(after=3)]):
        batch = inputs(family, model, rows=rows)
        options = {"cache_implementation": "static", "prefill_chunk_size": 16}
        difference, (got, expected), _ = run_both(model, batch, KINDS["after_vision"], **options)
        assert difference < TOLERANCE and torch.equal(got, expected)


def test_rows_of_tiles_end_where_text_begins() -> None:
    """LLaVA-NeXT: the overview of a picture and its first row, of 4 and 3 tokens, are no row of 7 of the one before."""
    model = model_of("llava_next", "sdpa")
    batch = inputs("llava_next", model, rows=[Row(images=((8, 24), (16, 8)), between=1)])
    with tp.attach(model, KINDS["after_vision"]) as on, torch.no_grad():
        model(**batch)
    assert on.report.grids == (((1, 2, 2), (1, 2, 7), (1, 2, 2), (1, 4, 3)),)
