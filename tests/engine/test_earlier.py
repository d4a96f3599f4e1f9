"""Hidden states of an earlier layer: recorded only where a part reads them, and those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, build, inputs, row_inputs
from pruned import TOLERANCE
from torch import Tensor

import tokenprune as tp
from tokenprune.core.needs import Needs
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.errors import UnsupportedModelError
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.scorers.baseline import RasterScorer
from tokenprune.stage import Stage


class ChangeScorer(Scorer):
    """How much the last `back` layers have changed a token (V2Drop)."""

    def __init__(self, *, back: int = 1) -> None:
        super().__init__()
        self.back = back

    @property
    def reads(self) -> Needs:
        return Needs(earlier=self.back)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        before = tokens.signal(f"earlier_{self.back}")
        return tokens.only_valid((tokens.hidden - before).float().norm(dim=-1))


class TowerScorer(Scorer):
    """The class token's attention, as it is."""

    reads = Needs(tower="class_attention")

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(tokens.signal("class_attention"))


def stage(layer: int, scorer: Scorer, keep: float) -> Stage:
    return Stage(
        place=Place("before_layer", layer),
        scheduler=FixedScheduler(keep=keep),
        scorer=scorer,
        sampler=TopKSampler(),
        recycler=DropRecycler(),
        name=f"before_{layer}",
    )


def hidden_states(model: Any, batch: Any) -> Sequence[Tensor]:
    """What enters each decoder layer; transformers' own `hidden_states` leave out what DeepStack adds in between."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for layer in model.get_decoder().layers
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_models_own_hidden_states(family: str) -> None:
    """Also two layers back, across a stage that has dropped tokens in between."""
    model = build(family)
    batch = inputs(family, model)
    stages = [stage(3, ChangeScorer(), 0.6), stage(4, RasterScorer(), 0.5), stage(5, ChangeScorer(back=2), 0.2)]
    with tp.attach(model, tp.Pipeline(stages)) as attached, torch.no_grad():
        model(**batch)
    first, _, last = attached.report.stages
    for row in range(2):
        alone = row_inputs(batch, row)
        states = hidden_states(model, alone)
        vision = (alone["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        change = (states[3] - states[2])[0, vision].norm(dim=-1)
        assert torch.allclose(first.scores[row, : len(vision)], change, atol=TOLERANCE, rtol=1e-5)
        kept = change.topk(first.sizes[row]).indices.sort().values
        assert first.kept[row][first.kept[row] >= 0].tolist() == kept.tolist()
    assert (last.scores[last.scored >= 0] > 0).all()


def test_nothing_is_recorded_where_nobody_reads() -> None:
    model = build("llava")
    with tp.attach(model, tp.Pipeline([stage(4, RasterScorer(), 0.5)])) as attached:
        assert attached.engine.taps.layers_read == set()
    with tp.attach(model, tp.Pipeline([stage(4, ChangeScorer(back=2), 0.5)])) as attached:
        assert attached.engine.taps.layers_read == {2}
        with torch.no_grad():
            model(**inputs("llava", model))
        assert not attached.engine.now.hidden


def test_what_no_hook_can_give_is_refused_by_name() -> None:
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match=r"before_1 .*entered a decoder layer 2 before the place"):
        tp.attach(model, tp.Pipeline([stage(1, ChangeScorer(back=2), 0.5)]))


def test_signals_of_a_tower_reach_parts_on_plain_tensors() -> None:
    attention = torch.rand(2, 16)
    tokens = Tokens.from_hidden(torch.randn(2, 16, 4), signals={"class_attention": attention})
    pipeline = tp.Pipeline([stage(1, RasterScorer(), 12), stage(2, TowerScorer(), 4)], depth=8)
    left = pipeline[2](pipeline[1](tokens))
    assert torch.equal(left.origin, (attention[:, 4:].topk(4).indices + 4).sort().values)
