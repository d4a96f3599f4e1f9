"""Stages made in Python, with parts that no recipe can name, on a Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from families import build, inputs
from pruned import logits_of

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import SolvedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.scorers.baseline import RandomScorer, RasterScorer
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage

RECIPE = {
    "version": 1,
    "budget": {"keep": 4},
    "stages": [{"name": "s", "place": {"before_layer": 3}, "scorer": "raster"}],
}


class Given(Scorer):
    """A part that no recipe can name: scores from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.empty(0)

    def forward(self, tokens: Tokens, raters: torch.Tensor | None = None) -> torch.Tensor:
        return self.scores.gather(1, tokens.origin.clamp(min=0)).masked_fill(~tokens.valid, -torch.inf)


class Weighted(Given):
    """A part with weights."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), value))

    def settings(self) -> dict[str, object]:
        return {}


def made(scorer: Scorer) -> Pipeline:
    stage = Stage(
        place=Place("before_layer", 3),
        scorer=scorer,
        scheduler=SolvedScheduler(),
        sampler=TopKSampler(),
        recycler=DropRecycler(),
    )
    return Pipeline([stage], budget=Budget("keep", 4), name="mine")


def test_stages_made_in_python_are_attached_as_they_are() -> None:
    """The same stage from a recipe and from Python gives the same bits, and a scorer of one's own is asked."""
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, RECIPE):
        expected = logits_of(model, batch)
    with tp.attach(model, made(RasterScorer())) as attached:
        assert torch.equal(logits_of(model, batch), expected)
        assert attached.report.recipe == "mine" and "mine" in repr(attached)
    given = Given()
    with tp.attach(model, made(given)) as attached:
        given.scores = torch.arange(1000, 0, -1.0).expand(len(batch["input_ids"]), -1)
        logits_of(model, batch)
        assert attached.report.stages[0].kept.tolist() == [[0, 1, 2, 3]] * len(given.scores)
    weights = {made(Weighted(each)).fingerprint for each in (0.0, 1.0)}
    assert len(weights) == 2  # settings alike, weights not
    prints = {made(scorer).fingerprint for scorer in (given, RasterScorer(), RandomScorer(), RandomScorer(seed=1))}
    assert len(prints) == 4 and made(given).fingerprint == made(Given()).fingerprint


def test_a_pipeline_takes_no_second_budget() -> None:
    with pytest.raises(InputError, match=r"attach\(pipeline, keep=0.5\): a Pipeline has the budget that it was made"):
        tp.attach(build("llava"), made(RasterScorer()), keep=0.5)


def test_flops_of_a_pipeline_are_solved_on_the_model() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    pipeline = Pipeline(made(RasterScorer()).stages, budget=Budget("flops", 0.8))
    with tp.attach(model, RECIPE, flops=0.8) as attached:
        expected, kept = logits_of(model, batch), attached.report.stages[0].kept
    with tp.attach(model, pipeline) as attached:
        assert torch.equal(logits_of(model, batch), expected)
        assert torch.equal(attached.report.stages[0].kept, kept)
