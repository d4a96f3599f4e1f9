"""`tp.load` and `tp.ask`: two calls from a name and a picture file to an answer with what ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError
from tokenprune.scenes import samples


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    model, processor = tp.load("embedded")
    return model, processor


def test_an_answer_comes_with_what_ran(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    sample = samples()[0]
    whole = tp.ask(model, processor, sample.path, sample.question, None)
    assert (str(whole), whole.report) == (sample.answer, None)
    answer = tp.ask(model, processor, sample.path, sample.question, "fastv", keep=36)
    assert answer.report is not None
    assert answer.report.vision_tokens[0].tolist() == [144] + [36] * 7
    assert not model._forward_pre_hooks, "the recipe is gone again"


def test_files_pictures_and_arrays_are_the_same(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    sample = samples()[1]
    picture = Image.open(sample.path).convert("RGB")
    ways = [sample.path, Path(sample.path), picture, np.asarray(picture), [picture]]
    answers = {str(tp.ask(model, processor, way, sample.question, "uniform", keep=0.5)) for way in ways}
    assert len(answers) == 1
    two = tp.ask(model, processor, [picture, sample.path], sample.question, "uniform", keep=10)
    assert two.report is not None and two.report.total == (288,)


def test_mistakes_are_told(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = embedded
    picture = samples()[0].path
    with pytest.raises(InputError, match="no such file"):
        tp.ask(model, processor, tmp_path / "none.png", "what ?")
    with pytest.raises(InputError, match="question is empty"):
        tp.ask(model, processor, picture, " ")
    with pytest.raises(InputError, match="budget needs a recipe"):
        tp.ask(model, processor, picture, "what ?", None, keep=3)
    with pytest.raises(RecipeError, match="did you mean 'fastv'"):
        tp.ask(model, processor, picture, "what ?", "fasv")
    with pytest.raises(InputError, match=r"no such model folder: embeded.*did you mean 'embedded'"):
        tp.load("embeded")


def test_load_takes_dtype_and_kernel(embedded: tuple[Any, Any]) -> None:
    model, _ = tp.load("embedded", dtype="bfloat16", attention="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
