"""The recycler `summary`: one token of what was dropped, read by plain loops; and what a fit makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from applied import recycled
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import WIDTH, batches, collate, counts_for

import tokenprune as tp
from tokenprune.core import ops
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError, RecipeError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import Chat
from tokenprune.fitting import Plan, fit
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.objectives import LogitsObjective
from tokenprune.fitting.soft import SoftStage
from tokenprune.parts.learned import Host
from tokenprune.parts.recyclers.summary import SummaryRecycler
from tokenprune.parts.scorers.learned import TextConditionedScorer
from tokenprune.recipe import load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import training_cases
from tokenprune.stage import Stage


def fitted(seed: int) -> SummaryRecycler:
    """With weights that a fit might have made."""
    made = SummaryRecycler().start(Host("", WIDTH), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for value in made.parameters():
        value.copy_(torch.randn(value.shape, generator=draw))
    return made


def by_hand(part: SummaryRecycler, rows: list[list[float]]) -> list[float]:
    """The formula, number by number."""
    worth = []
    for x in rows:
        mean = sum(x) / len(x)
        spread = math.sqrt(sum((value - mean) ** 2 for value in x) / len(x) + 1e-5)
        gains, offsets, looks = (p.tolist() for p in (part.norm.weight, part.norm.bias, part.score.weight[0]))
        worth.append(
            sum(w * ((value - mean) / spread * g + o) for w, value, g, o in zip(looks, x, gains, offsets, strict=True))
        )
    powers = [math.exp(value - max(worth)) for value in worth]
    return [sum(p * x[axis] for p, x in zip(powers, rows, strict=True)) / sum(powers) for axis in range(len(rows[0]))]


@settings(max_examples=40)
@given(batches(least=1), st.data(), st.integers(0, 100), st.booleans())
def test_it_is_the_formula_number_by_number(batch: Any, data: Any, seed: int, bare: bool) -> None:
    counts = data.draw(counts_for(batch))
    tokens = collate(batch, extra=data.draw(st.integers(0, 2)))
    scores = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed))
    kept = ops.top_k(scores.masked_fill(~tokens.valid, -torch.inf), counts, tokens.valid)
    part = SummaryRecycler() if bare else fitted(seed)
    got, _ = recycled(part, tokens, kept, scores, counts)
    for row, sample in enumerate(batch):
        chosen = [i for i in kept[row].tolist() if i >= 0]
        gone = [i for i in range(len(sample.alive)) if i not in chosen]
        left = sorted(chosen + gone[-1:])
        assert got.origin[row, : len(left)].tolist() == [sample.alive[i] for i in left]
        assert got.sizes[row] == len(left)
        if not gone:
            assert torch.equal(got.hidden[row, : len(left)], sample.hidden)
            continue
        rows = [sample.hidden[i].tolist() for i in gone]
        want = np.mean(rows, axis=0) if bare else by_hand(part, rows)
        at = left.index(gone[-1])
        assert np.allclose(got.hidden[row, at].numpy(), want, atol=1e-5)
        assert got.mass[row, at] == len(gone)
        for place, i in enumerate(left):
            if i in chosen:
                assert torch.equal(got.hidden[row, place], sample.hidden[i])


def test_a_fit_starts_at_the_mean() -> None:
    tokens = tp.Tokens.from_hidden(torch.randn(2, 12, WIDTH), grid=(3, 4))
    kept, scores = torch.tensor([[0, 5], [3, 11]]), torch.zeros(2, 12)
    bare, _ = recycled(SummaryRecycler(), tokens, kept, scores, 2)
    fresh, _ = recycled(SummaryRecycler().start(Host("", WIDTH), seed=3), tokens, kept, scores, 2)
    assert torch.equal(bare.hidden, fresh.hidden)


def test_it_needs_no_weights_but_those_it_has_must_fit() -> None:
    tokens = tp.Tokens.from_hidden(torch.randn(1, 12, WIDTH + 1), grid=(3, 4))
    with pytest.raises(InputError, match="its weights are for hidden states of 6 numbers"):
        recycled(fitted(0), tokens, torch.tensor([[0]]), torch.zeros(1, 12), 1)
    SummaryRecycler().check_host(Host("llava", 64))
    with pytest.raises(InputError, match="its weights were made for"):
        fitted(0).check_host(Host("llava", 64))
    with pytest.raises(RecipeError, match="has no weights"):
        TextConditionedScorer().check_host(Host("llava", 64))


def test_predictions_teach_it() -> None:
    """Gradients come through attention among vision tokens and by what text reads of the summary."""
    model, processor = load_embedded()
    cases = training_cases(2)
    stages = fresh_stages(load_recipe("skip-vision"), host_of(anatomy(model)))
    part = stages[0].recycler.requires_grad_(True)
    with torch.no_grad():
        part.score.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))  # nothing goes through 0
    goal = LogitsObjective(Chat("", model, processor), stages, Plan(aim="logits", keep=(0.1, 0.1)))
    prompts = [case.picture() for case in cases[:2]], [case.question for case in cases[:2]]
    goal.loss(prompts, torch.Generator().manual_seed(0)).backward()
    assert [stage.dropped for stage in goal._stages] == ["skip_ffn"]
    for name, value in part.named_parameters():
        assert value.grad is not None
        assert value.grad.isfinite().all()
        assert value.grad.any() or name == "norm.bias", name  # which all tokens share


@pytest.mark.slow
def test_a_fit_writes_a_recipe_that_runs(tmp_path: Path) -> None:
    model, processor = load_embedded()
    cases = training_cases(4)
    made = fit(
        model, processor, "skip-vision", cases, tmp_path, plan=Plan(aim="logits", steps=3, batch=2, keep=(0.1, 0.1))
    )
    loaded = load_recipe(made.recipe)
    assert loaded.stages[0].recycler.settings()["weights"] is not None
    assert loaded.stages[0].dropped == "skip_ffn"
    with torch.no_grad(), tp.attach(model, made.recipe) as attached:
        model(**processor(images=cases[0].picture(), text="<image> what ?", return_tensors="pt"))
    assert attached.report.stages[0].skips


def test_scores_cannot_be_learned_where_nothing_is_removed() -> None:
    stage = Stage(place=2, scorer=TextConditionedScorer(), dropped="skip_ffn")
    with pytest.raises(RecipeError, match="learns by gates, which stand in for removal"):
        SoftStage(stage, lambda size: size, torch.Generator())
