"""What the machine allows: the untouched model with its sequence simply cut, without tokenprune.

The ceiling of a recipe counts multiply-adds. Products of few rows run at a lower rate than those of many, whoever asks
for them; weights, `lm_head` among them, are read once however short the prompt is; the vision tower and the work of
`generate` stay. So here each decoder layer is handed the last tokens of what it would have got, as many as a recipe
leaves it: slices in a hook of a few lines, no scores, no choice, no gather; keys and values are written to the cache,
as any method must. No method that leaves so many tokens can be faster, and nothing of tokenprune's engine runs in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenprune.budget import tokens_per_layer
from tokenprune.builder import build
from tokenprune.engine.cache import cache_in
from tokenprune.families.noise import Pictures
from tokenprune.recipe import Recipe


def lengths(recipe: Recipe, layers: int, pictures: Pictures, text: int) -> list[int]:
    """Tokens that enter each of `layers` under a recipe whose counts are known from shapes, text included."""
    pipeline = build(recipe, depth=layers)
    counts = [count for count in pipeline.plan(pictures.tokens, pictures.grids) if count is not None]
    assert len(counts) == len(pipeline.stages), f"{recipe.name}: an adaptive recipe has no lengths beforehand"
    return [n + text for n in tokens_per_layer(pipeline.steps(), counts, layers, pictures.tokens)]


def cut(model: PreTrainedModel, entering: list[int]) -> None:
    """Let layer i of the decoder see the last ``entering[i]`` tokens, from now on. For prefills alone."""
    text = model.model.language_model
    text.register_forward_pre_hook(_shrinking([entering[0] - length for length in entering]), with_kwargs=True)
    for layer, length in zip(text.layers, entering, strict=True):
        layer.register_forward_pre_hook(_slicing(length), with_kwargs=True)


def _shrinking(dropped: list[int]) -> Callable[..., None]:
    def before_text(text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Static buffers are made when they are first written to: by then they are to be as short as their layers'."""
        cache = cache_in(kwargs)
        if getattr(cache, "is_compileable", False):
            for store, less in zip(cache.layers, dropped, strict=True):
                if not store.is_initialized:
                    store.max_cache_len -= less

    return before_text


def _slicing(length: int) -> Callable[..., Any]:
    def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        hidden = given[:, -length:].contiguous()
        cos, sin = kwargs["position_embeddings"]
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor):
            mask = mask[:, :, -length:, mask.shape[2] - length :]
        kwargs = {
            **kwargs,
            "position_embeddings": (cos[..., -length:, :], sin[..., -length:, :]),
            "attention_mask": mask,
            "position_ids": None if ids is None else ids[..., -length:],
        }
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return before_layer
