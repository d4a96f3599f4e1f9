"""The scorer `glimpse_token`: its token is exact on a model, costs what it states, and learns where to look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import Row, build, inputs, row_inputs, vision_mask
from glimpses import Looking, appended
from pruned import TOLERANCE, logits_of
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

import tokenprune as tp
from tokenprune.cost.account import account
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError, RecipeError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.shape import model_shape
from tokenprune.fitting.written import learned_parts, write_weights
from tokenprune.parts.learned import Host
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.parts.scorers.glimpse import FLOOR
from tokenprune.parts.scorers.glimpse_token import GlimpseTokenScorer
from tokenprune.parts.work import Work
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import load_recipe
from tokenprune.stage import Stage

LAYERS, PLACE = 6, 4


def started(model: Any, *, seed: int = 0, **settings: Any) -> GlimpseTokenScorer:
    return GlimpseTokenScorer(**settings).start(host_of(anatomy(model)), seed=seed)


def behind(scorer: Any, *before: Stage, keep: int = 6) -> Pipeline:
    own = Stage(place=PLACE, scorer=scorer, scheduler=FixedScheduler(keep=keep), name="glimpse")
    return Pipeline([*before, own], depth=LAYERS, name="glimpse")


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_training_starts_at_the_mean_over_heads_of_what_an_appended_token_looks_at(family: str) -> None:
    eager = build(family, attention="eager", layers=LAYERS)
    scorer = started(eager)
    batch = inputs(family, eager)
    model = build(family, layers=LAYERS)
    with tp.attach(model, behind(scorer)) as attached:
        logits_of(model, batch)
    scores = attached.report.stages[0].scores
    assert scores is not None
    for row in range(2):
        paid = appended(eager, row_inputs(batch, row), scorer.token, PLACE - 1)
        expected = (paid.mean(0) * paid.shape[1] + FLOOR).log()
        assert float((scores[row, : paid.shape[1]] - expected).abs().max()) < 10 * TOLERANCE
    assert scorer.token.std() == pytest.approx(0.02, rel=0.1)


def test_its_weights_are_read_again_and_fit_no_other_depth(tmp_path: Path) -> None:
    model = build("llava", layers=LAYERS)
    told = {
        "version": 1,
        "name": "mine",
        "stages": [{"name": "only", "place": {"before_layer": PLACE}, "scorer": {"type": "glimpse_token", "dim": 8}}],
        "budget": {"keep": 0.5},
    }
    recipe = load_recipe(told)
    with pytest.raises(RecipeError, match="scorer 'glimpse_token' has no weights: make them with"):
        tp.attach(model, recipe)
    stages = [stage.build() for stage in recipe.stages]
    for stage in stages:
        stage.scorer.start(host_of(anatomy(model)), seed=3)  # type: ignore[operator]
    path, _ = write_weights(recipe, learned_parts(stages), tmp_path, made_by="a test")
    batch, found = inputs("llava", model), []
    for each in (path, Pipeline(stages, budget=recipe.budget, depth=LAYERS, name="same")):
        with tp.attach(model, each) as attached:
            logits_of(model, batch)
        found.append(attached.report.stages[0].kept)
    assert torch.equal(*found)
    with pytest.raises(InputError, match=r"made for 6 decoder layers, and this model has 8; fit the recipe to it"):
        tp.attach(build("llava"), path)


def test_places_and_models_without_it_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"a glimpse behind the prompt, which runs through decoder layers: none has"):
        load_recipe({"version": 1, "name": "mine", "stages": [{"place": "after_vision", "scorer": "glimpse_token"}]})
    with pytest.raises(RecipeError, match="has a vector for each decoder layer, and this model does not say how many"):
        GlimpseTokenScorer().start(Host("", 8, 2), seed=0)
    part = GlimpseTokenScorer(dim=8).start(Host("", 8, 2, 3), seed=0)
    with pytest.raises(InputError, match="looks from behind the prompt, and no decoder layers have run here"):
        part(tp.Tokens.from_hidden(torch.zeros(1, 4, 8)))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_it_states_is_what_a_counter_sees(family: str) -> None:
    """Behind another stage, so that layers have different lengths."""
    model = build(family, attention="eager", layers=LAYERS)
    batch = inputs(family, model, rows=[Row(before=3, after=9)])
    counted: list[int] = []

    class Counted(Looking):
        def forward(self, tokens: tp.Tokens, raters: Tensor | None = None) -> Tensor:
            with FlopCounterMode(display=False) as counter:
                scores = super().forward(tokens, raters)
            counted.append(int(counter.get_total_flops()) // 2)
            return scores

        def multiply_adds(self, work: Work) -> int:
            return work.glimpse

    first = Stage(place=2, scorer=NormScorer(), scheduler=FixedScheduler(keep=12), name="first")
    pipeline = behind(Counted(vectors=0.1 * torch.randn(LAYERS, 64)), first)
    with tp.attach(model, pipeline) as attached:
        logits_of(model, batch)
    vision = vision_mask(model, batch["input_ids"])[0]
    text, total = int((~vision).sum()), int(vision.sum())
    told = account(model_shape(model.config), pipeline, total=total, grids=attached.report.grids[0], text=text)
    assert told.reduced.stages[1].parts["scorer"] == counted[0] > 0


def test_its_cost_is_that_of_the_predictor_and_of_the_glimpse() -> None:
    work = Work(
        tokens=40, kept=10, total=40, text=6, raters=1, sequence=50, width=8, heads=2, kv_heads=2, head_dim=4,
        glimpse=1000,
    )  # fmt: skip
    block = 2 * 4 + 8 * 4 + 2 * (8 * 4) + 4 * 4 + 2 * (4 * 8) + 4
    assert GlimpseTokenScorer(dim=4).multiply_adds(work) == 1000 + 40 * block + 2 * 40 * 40 * 4


def test_gradients_reach_its_token_through_the_layers() -> None:
    """Those of layers that it runs through; the model gets none."""
    model = build("llava", layers=LAYERS).requires_grad_(False)
    scorer = started(model).requires_grad_(True)
    with tp.attach(model, behind(scorer)) as attached:
        model(**inputs("llava", model))
    scores = attached.report.stages[0].scores
    assert scores is not None
    scores[:, :6].sum().backward()
    grad = scorer.token.grad
    assert grad is not None and all(float(each.abs().sum()) > 0 for each in grad[:PLACE]) and not grad[PLACE:].any()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_learns_where_to_look(seed: int) -> None:
    """On a frozen model, for prompts it was not taught with: which tokens it is to find, only the token can learn.

    Wanted are vision tokens whose keys in the last layer below the place lie along one direction, which no token of the
    prompt was made to look for. The predictor alone, which reads what an untrained token looks at, finds fewer.
    """
    model = build("llava", layers=LAYERS).requires_grad_(False)
    found: dict[bool, tuple[float, float]] = {}
    for learns in (True, False):
        scorer = started(model, seed=seed, dim=16, picture=False).requires_grad_(True)
        scorer.token.requires_grad_(learns)
        before = _recall(model, scorer, 1000)
        optimiser = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], lr=2e-2)
        for step in range(40):
            scores, wanted = _asked(model, scorer, step)
            loss = binary_cross_entropy_with_logits(scores, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found[learns] = before, _recall(model, scorer, 1000)
    (before, after), (_, blind) = found[True], found[False]
    assert after > max(before, blind, 6 / 25) + 0.15, found


def _asked(model: Any, scorer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of the tokens of eight prompts, and which six of each are wanted."""
    batch = inputs("llava", model, rows=[Row()] * 8, seed=seed)
    keys: list[Tensor] = []
    layer = model.get_decoder().layers[PLACE - 1].self_attn.k_proj
    handle = layer.register_forward_hook(lambda module, args, output: keys.append(output.detach()))
    with tp.attach(model, behind(scorer)) as attached:
        model(**batch)
    handle.remove()
    vision = vision_mask(model, batch["input_ids"])
    seen = keys[0][vision].view(8, 25, -1)
    along = seen @ torch.randn(seen.shape[-1], generator=torch.Generator().manual_seed(5))
    wanted = torch.zeros(8, 25).scatter_(1, along.topk(6).indices, 1.0)
    scores = attached.report.stages[0].scores
    assert scores is not None
    return scores, wanted


def _recall(model: Any, scorer: Any, seed: int) -> float:
    with torch.no_grad():
        scores, wanted = _asked(model, scorer, seed)
    return float(wanted.gather(1, scores.topk(6).indices).mean())
