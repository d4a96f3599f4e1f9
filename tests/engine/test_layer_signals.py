"""What stages read of the layer that has run, and of the question at their place, is what the model computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, build, inputs, row_inputs
from pruned import TOLERANCE
from torch import Tensor

import tokenprune as tp
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.scorers.baseline import RasterScorer
from tokenprune.stage import Stage


class Watching(Scorer):
    """Keeps what it is shown."""

    reads = Needs(layer_keys=True, layer_queries=True, question_states=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.seen = tokens
        return tokens.only_valid(tokens.origin.float())


class Unaware(Scorer):
    """Reads the question, and more of it than it has declared."""

    reads = Needs(question=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(tokens.question.states.sum() + tokens.mass)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_queries_and_states_are_the_models_own(family: str) -> None:
    """Before layer 5, behind a stage that has dropped tokens before the same layer and one before that."""
    model = build(family)
    batch, watch = inputs(family, model, side="right"), Watching()
    keep = FixedScheduler(keep=0.999)  # nearly all, so that the plain model is not far; kept tokens are compared
    stages = [
        Stage(place=5, scheduler=keep, scorer=RasterScorer()),
        Stage(place=5, scheduler=FixedScheduler(keep=0.5), scorer=watch),
    ]
    with tp.attach(model, tp.Pipeline(stages)), torch.no_grad():
        model(**batch)
    seen = watch.seen
    for row in range(2):
        alone = row_inputs(batch, row)
        found: dict[str, Tensor] = {}
        layer: Any = model.get_decoder().layers[4].self_attn
        q_hook = layer.q_proj.register_forward_hook(lambda m, a, out, found=found: found.update(q=out))
        with torch.no_grad():
            result = model(**alone, use_cache=True)
        q_hook.remove()
        keys = getattr(result, CACHE, None) or result.past_key_values
        keys = keys.layers[4].keys[0].transpose(0, 1)  # [L, Hkv, d]
        ids = alone["input_ids"][0]
        vision = (ids == model.config.image_token_id).nonzero().flatten()
        texts = torch.arange(len(ids))
        texts = texts[(ids != model.config.image_token_id) & (texts > vision[0])]
        size = seen.sizes[row]
        assert torch.allclose(seen.signal("layer_keys")[row, :size], keys[vision[seen.origin[row, :size]]], atol=1e-4)
        queries = seen.signal("layer_queries")[row, :size]
        assert (
            queries.flatten(1)
            .norm(dim=1)
            .allclose(normed(layer, found["q"][0, vision[seen.origin[row, :size]]]), atol=1e-3)
        )  # turned, so of the same length
        real = seen.question.valid[row]
        assert torch.allclose(seen.question.keys[row, real], keys[texts], atol=1e-4)
        states = entered(model, alone, 5)[0, texts]
        assert torch.allclose(seen.question.states[row, real], states, atol=10 * TOLERANCE)
        assert (seen.question.slot[row, real] > seen.slot[row, 0]).all()


def normed(layer: Any, queries: Tensor) -> Tensor:
    heads = queries.view(len(queries), -1, layer.head_dim)
    return (layer.q_norm(heads) if hasattr(layer, "q_norm") else heads).flatten(1).norm(dim=1)


@torch.no_grad()
def entered(model: Any, batch: Any, index: int) -> Tensor:
    found: list[Tensor] = []
    layer = model.get_decoder().layers[index]
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        model(**batch)
    finally:
        handle.remove()
    return found[0]


def test_what_is_not_declared_or_not_there_is_refused_by_name() -> None:
    model = build("llava")
    unaware = tp.Pipeline([Stage(place=3, scheduler=FixedScheduler(keep=0.5), scorer=Unaware())])
    reads = pytest.raises(InputError, match=r"reads hidden states of the question.*question_states=True")
    with tp.attach(model, unaware), reads, torch.no_grad():
        model(**inputs("llava", model))
    first = tp.Pipeline([Stage(place=0, scheduler=FixedScheduler(keep=0.5), scorer=Watching())])
    with pytest.raises(UnsupportedModelError, match="reads queries or keys of the layer before, but nothing runs"):
        tp.attach(model, first)
    stage = {"place": "after_vision", "scheduler": {"type": "fixed", "keep": 0.5}, "sampler": "pivot"}
    with pytest.raises(RecipeError, match="none has run after vision"):
        tp.load_recipe({"version": 1, "name": "early", "stages": [stage]})
