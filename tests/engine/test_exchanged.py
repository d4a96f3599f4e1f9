"""Modules exchanged while a recipe is attached are followed or refused; foreign calls of projections do not count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, build, inputs
from kinds import ATTENTION, fixed, recipe, stage
from pruned import logits_of
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError

ASKED = recipe(
    "asked",
    stage(2, fixed(0.6), raters="last_text", scorer=ATTENTION),
    stage(3, fixed(0.5), raters="all_text", scorer={**ATTENTION, "layer": "next"}),
)
"""Reads queries and keys of layer 1 as it runs, and of layer 3 before it runs."""


class LowRank(nn.Module):
    """A projection with an adapter beside it, as LoRA puts it in the place of a linear layer."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        self.base_layer = base
        random = torch.Generator().manual_seed(seed)
        rows, columns = base.weight.shape
        self.down = nn.Parameter(torch.randn(2, columns, generator=random))
        self.up = nn.Parameter(torch.randn(rows, 2, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def adapt(model: Any) -> None:
    for index in (1, 3):
        attention = model.get_decoder().layers[index].self_attn
        attention.q_proj, attention.k_proj = LowRank(attention.q_proj, 1), LowRank(attention.k_proj, 2)


def adapt_not(model: Any) -> None:
    for index in (1, 3):
        attention = model.get_decoder().layers[index].self_attn
        attention.q_proj, attention.k_proj = attention.q_proj.base_layer, attention.k_proj.base_layer


def other(layer: nn.Module) -> nn.Module:
    """Another layer of the same kind."""
    new = copy.deepcopy(layer)
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(0.5 * weight.roll(1, 0))
    return new


def exchange_layers(model: Any) -> None:
    layers = model.get_decoder().layers
    for index in (0, 1, 2, 3):
        layers[index] = other(layers[index])


def exchange_the_list(model: Any) -> None:
    text = model.get_decoder()
    text.layers = nn.ModuleList([other(layer) for layer in text.layers])


def exchange_attention(model: Any) -> None:
    for index in (1, 3):
        layer = model.get_decoder().layers[index]
        layer.self_attn = other(layer.self_attn)


def kept(attached: tp.Attached) -> list[list[list[int]]]:
    return [each.kept.tolist() for each in attached.report.stages]


@pytest.mark.parametrize("change", [adapt, exchange_layers, exchange_the_list, exchange_attention])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_next_prefill_uses_the_modules_that_are_there(family: str, change: Callable[[Any], None]) -> None:
    model, fresh = build(family, layers=4), build(family, layers=4)
    batch = inputs(family, model)
    change(fresh)
    with tp.attach(fresh, ASKED) as attached:
        expected, chosen = logits_of(fresh, batch), kept(attached)
    with tp.attach(model, ASKED) as attached:
        before = logits_of(model, batch)
        assert kept(attached) != chosen
        change(model)
        assert torch.equal(logits_of(model, batch), expected)
        assert kept(attached) == chosen
        if change is adapt:
            adapt_not(model)
            assert torch.equal(logits_of(model, batch), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.get_decoder().modules())


@pytest.mark.in_turn(2)
@pytest.mark.parametrize(("change", "adaptive"), [(adapt, False), (exchange_layers, True)])
def test_compiled_code_follows_too(change: Callable[[Any], None], adaptive: bool) -> None:
    asked = copy.deepcopy(ASKED)
    if adaptive:
        asked["stages"][0] |= {"scheduler": {"type": "rank_ratio", "scale": 0.5, "energy": 0.9}}
    model, fresh = build("llava", layers=4), build("llava", layers=4)
    batch = inputs("llava", model)
    change(fresh)
    with tp.attach(fresh, asked) as attached:
        expected, chosen = logits_of(fresh, batch), kept(attached)
    with tp.attach(model, asked, compile={"backend": "eager"}) as attached:
        logits_of(model, batch)
        change(model)
        # Before the last token an adaptive stage may leave padding, up to its bucket.
        assert (logits_of(model, batch)[:, -1] - expected[:, -1]).abs().max() < 1e-5
        assert kept(attached) == chosen
    torch.compiler.reset()


def test_what_cannot_be_followed_is_refused() -> None:
    model, spare = build("llava", layers=4), build("llava", layers=4, seed=1)
    batch = inputs("llava", model)
    text = model.model.language_model
    with tp.attach(model, ASKED):
        logits_of(model, batch)
        layers, text.layers = text.layers, text.layers[:3]
        with pytest.raises(UnsupportedModelError, match="attached to 4 decoder layers, and now there are 3; detach it"):
            logits_of(model, batch)
        text.layers = layers
        for owner, name in ((model.model, "language_model"), (model, "model")):
            own = getattr(owner, name)
            setattr(owner, name, getattr(spare.model if owner is model.model else spare, name))
            for run in (lambda: logits_of(model, batch), lambda: model.generate(**batch, max_new_tokens=1)):
                with pytest.raises(UnsupportedModelError, match=r"'asked': the language model .* was exchanged"):
                    run()
            setattr(owner, name, own)
        projection = layers[1].self_attn.q_proj
        del layers[1].self_attn.q_proj
        with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer has no q_proj"):
            logits_of(model, batch)
        layers[1].self_attn.q_proj = projection
        logits_of(model, batch)


# ---------------------------------------------------------------------------------------------- foreign calls


def project_more(attention: Any, hidden: Tensor) -> None:
    attention.q_proj(hidden.flip(1)), attention.k_proj(hidden * 2), attention.q_proj(hidden[:, -3:])


def around_the_layer(layer: Any) -> list[Any]:
    see = lambda module, args, kwargs, *rest: project_more(layer.self_attn, args[0])  # noqa: E731
    return [
        layer.register_forward_pre_hook(see, with_kwargs=True),
        layer.register_forward_hook(see, with_kwargs=True),
    ]


def around_the_attention(layer: Any) -> list[Any]:
    see = lambda module, args, kwargs, *rest: project_more(module, kwargs["hidden_states"])  # noqa: E731
    return [
        layer.self_attn.register_forward_pre_hook(see, with_kwargs=True, prepend=True),
        layer.self_attn.register_forward_pre_hook(see, with_kwargs=True),
        layer.self_attn.register_forward_hook(see, with_kwargs=True),
    ]


def inside_the_attention(layer: Any) -> list[Any]:
    return [
        layer.self_attn.o_proj.register_forward_hook(lambda *_: project_more(layer.self_attn, torch.ones(2, 9, 64)))
    ]


@pytest.mark.parametrize(
    "who", [around_the_layer, around_the_attention, inside_the_attention], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_layers_own_projections_count(family: str, who: Callable[[Any], list[Any]]) -> None:
    model = build(family, layers=4)
    batch = inputs(family, model)
    with tp.attach(model, ASKED) as attached:
        expected, chosen = logits_of(model, batch), kept(attached)
        for again in range(2):
            handles = who(model.get_decoder().layers[1])
            assert torch.equal(logits_of(model, batch), expected), again
            assert kept(attached) == chosen
            for handle in handles:
                handle.remove()


def test_an_attention_whose_input_a_later_hook_changes_is_refused() -> None:
    model = build("llava", layers=4)
    change = lambda module, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2})  # noqa: E731
    with tp.attach(model, ASKED):
        model.get_decoder().layers[1].self_attn.register_forward_pre_hook(change, with_kwargs=True)
        with pytest.raises(UnsupportedModelError, match=r"what entered its attention .*later hook that changes it"):
            logits_of(model, inputs("llava", model))


@pytest.mark.parametrize("cut", [slice(None, None, 2), slice(4, None)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_not_read_from_a_cache_that_somebody_has_shortened(family: str, cut: slice) -> None:
    model = build(family, layers=4)
    batch = inputs(family, model)

    def compress(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs[CACHE].layers[1]
        layer.keys, layer.values = layer.keys[:, :, cut], layer.values[:, :, cut]

    with tp.attach(model, ASKED) as attached:
        logits_of(model, batch, use_cache=True)
        chosen = kept(attached)
        model.get_decoder().layers[1].self_attn.register_forward_hook(compress, with_kwargs=True)
        cache = model(**batch, use_cache=True)[CACHE]
        assert kept(attached) == chosen
    assert cache.layers[1].keys.shape[2] < batch["input_ids"].shape[1]
