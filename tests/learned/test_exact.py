"""Learned recipes on models: equal to the masked reference, alone or in a batch, and gradients reach what learns."""

from __future__ import annotations

import pytest
import torch
from families import build, inputs
from pruned import TOLERANCE, run_both

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.engine.weights import host_of
from tokenprune.families.anatomy import anatomy
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.soft import SoftStage
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import list_learned_recipes, load_recipe

LAYERS = 4


def pipeline_of(name: str, model: torch.nn.Module, keep: float) -> Pipeline:
    """A learned recipe that has learned nothing: what it keeps is odd, how it is kept must be exact."""
    stages = fresh_stages(load_recipe(name), host_of(anatomy(model)))
    return Pipeline(stages, budget=Budget("keep", keep), depth=LAYERS, name=name)


@pytest.mark.parametrize("name", list_learned_recipes())
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_it_equals_the_masked_reference(family: str, name: str) -> None:
    model = build(family, layers=LAYERS)
    difference, (got, expected), report = run_both(model, inputs(family, model), pipeline_of(name, model, 0.4))
    assert torch.equal(got, expected)
    assert difference < TOLERANCE
    assert bool((report.vision_tokens[:, -1] < torch.tensor(report.total)).all())


def test_counts_of_each_samples_own_equal_the_masked_reference() -> None:
    model = build("llava", layers=LAYERS)
    stages = fresh_stages(load_recipe("smarttrim"), host_of(anatomy(model)))
    draw = torch.Generator().manual_seed(2)
    for stage in stages:
        for parameter in stage.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw)
        stage.scorer.policy[-1].bias.data += torch.tensor([2.0, 0.0])  # or nearly all are kept
    pipeline = Pipeline(stages, depth=LAYERS, name="smarttrim")
    difference, (got, expected), report = run_both(model, inputs("llava", model), pipeline)
    assert torch.equal(got, expected)
    assert difference < TOLERANCE
    sizes = [stage.sizes for stage in report.stages]
    assert any(len(set(each)) > 1 for each in sizes)
    assert all(0 < last < first < total for last, first, total in zip(sizes[1], sizes[0], report.total, strict=True))


def test_gates_are_the_pruned_model_and_give_every_score_a_gradient() -> None:
    """With hard gates and the same choice, the soft stage's logits are those of the model without the tokens."""
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    (stage,) = fresh_stages(load_recipe("text-conditioned"), host_of(anatomy(model)))
    soft = SoftStage(stage, lambda size: 9, torch.Generator().manual_seed(0))
    stage.requires_grad_(True)
    with tp.attach(model, Pipeline([soft], depth=LAYERS, name="soft")) as attached:
        logits = model(**batch).logits[:, -1]
        scores = attached.report.stages[0].scores
    logits.square().sum().backward()
    grads = [parameter.grad for parameter in stage.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
    assert sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0
    assert scores is not None and scores.shape[1] == 50
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_the_choice_of_a_gate_is_removal() -> None:
    from tokenprune.core.gates import noisy_top_k
    from tokenprune.parts.schedulers.fixed import FixedScheduler
    from tokenprune.parts.scorers.base import Scorer
    from tokenprune.stage import Stage

    class Ranked(Scorer):
        """Scores far apart, so that noise changes nothing."""

        multiply_adds = lambda self, work: 0  # noqa: E731

        def forward(self, tokens: tp.Tokens, raters: torch.Tensor | None = None) -> torch.Tensor:
            return tokens.only_valid(100.0 * ((tokens.origin * 7) % 53).float())

    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    hard = Stage(place=2, scorer=Ranked(), scheduler=FixedScheduler(keep=9))
    soft = SoftStage(hard, lambda size: 9, torch.Generator().manual_seed(0))
    logits = []
    for stage in (hard, soft):
        with tp.attach(model, Pipeline([stage], depth=LAYERS, name="one")), torch.no_grad():
            logits.append(model(**batch).logits[:, -1])
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    with torch.no_grad():
        assert (logits[0] - model(**batch).logits[:, -1]).abs().max() > 1e-2, "nothing was removed"
    assert noisy_top_k(torch.zeros(1, 3), [3]).tolist() == [[1, 1, 1]]
