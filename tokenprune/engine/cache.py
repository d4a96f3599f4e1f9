"""A cache under a recipe: which of its layers can be shortened, whose prompt it holds, and what a layer loses."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

from tokenprune.engine.cache_layers import (
    VIRTUAL,
    CacheLayer,
    Owner,
    Slots,
    VirtualLength,
    VirtualSlidingLayer,
    VirtualStaticLayer,
)
from tokenprune.errors import UnsupportedModelError


def held_in(cache: Any | None) -> Any | None:
    """What waits in `cache` for the rest of its prompt."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "held", None) if layers else None


def hold(cache: Cache, held: Sized | None) -> None:
    """Let `cache` report the tokens of `held`, of which nothing is stored yet; None: nothing waits any more."""
    layer = layer_of(cache, 0)
    virtualise(layer)
    assert layer is not None
    layer.held = held


def cache_in(kwargs: Mapping[str, Any]) -> Any | None:
    """The cache among the arguments of a model or of one of its layers, by its name of today or by the one that it had
    before transformers 5.24; None without."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def layer_of(cache: Any | None, index: int) -> CacheLayer | None:
    """The cache layer at `index`; lazily built caches grow to it. None without a cache, and from one without layers
    (continuous batching has such, for prompts of text)."""
    if not isinstance(cache, Cache):
        return None
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def slots_of(layer: CacheLayer | None) -> Slots | None:
    """What the layer's slots hold, or None when no token was ever dropped from it."""
    return getattr(layer, "slots", None)  # much faster than a look at its class, in each step of decoding


def different_slots(cache: Cache | None) -> list[Slots]:
    """What the slots of its pruned layers hold; neighbours share theirs."""
    found: list[Slots] = []
    for layer in getattr(cache, "layers", ()):
        slots = slots_of(layer)
        if slots is not None and not (found and found[-1] is slots):
            found.append(slots)
    return found


def window_of(layer: CacheLayer | None) -> int | None:
    """Keys that a dynamic sliding layer can show a query, itself included; None for any other layer."""
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def held_by(layer: CacheLayer, window: int) -> int:
    """Keys of earlier forwards that a sliding layer shows to the coming one."""
    keys = layer.keys
    return 0 if keys is None or not layer.is_initialized else min(int(keys.shape[-2]), window - 1)


def written_keys(layer: CacheLayer | None, stored: int, length: int) -> Tensor | None:
    """Keys ``[B, Hkv, length, d]`` that a layer stored in the running forward, as its attention reads them.

    None without a cache; from a static one, whose buffer has them anywhere; and where something else has shortened the
    cache since, so that nobody knows which keys are left.

    Args:
        layer: of the cache.
        stored: tokens that stood in it before this forward.
        length: tokens of this forward.
    """
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return None
    keys: Tensor = layer.keys
    return keys[:, :, stored:] if keys.shape[2] == stored + length else None


def check_cache(cache: Any | None) -> None:
    """Raise `UnsupportedModelError` unless `cache` has layers, each of which can hold a shortened sequence."""
    for layer in () if cache is None else getattr(cache, "layers", (cache,)):
        if type(layer) is LinearAttentionLayer:  # a state of fixed size, whatever it has read
            continue
        if type(layer) not in VIRTUAL and not isinstance(layer, VirtualLength):
            known = ", ".join(cls.__name__ for cls in VIRTUAL)
            raise UnsupportedModelError(
                f"cache: {type(layer).__name__} cannot hold a shortened sequence; expected one of {known}. "
                "Use the default cache"
            )


def virtualise(layer: CacheLayer | None, owner: Owner | None = None) -> None:
    """Let this one cache layer report the untouched length (its own class is swapped, transformers is not touched)."""
    if layer is None:
        return
    if not isinstance(layer, VirtualLength):
        layer.__class__ = VIRTUAL[type(layer)]
        layer.removed, layer.slots = 0, None
        if isinstance(layer, VirtualStaticLayer):
            layer.shrunk = 0
    if owner is not None:
        layer.owner = owner


def adopt(cache: Any | None, owner: Owner) -> None:
    """Let `owner` go on with a cache that an earlier attachment of the same recipe has shortened.

    Raises:
        UnsupportedModelError: another recipe has.
    """
    for layer in getattr(cache, "layers", ()):
        if slots_of(layer) is None or layer.owner is owner:
            continue
        if layer.owner.fingerprint != owner.fingerprint:
            raise UnsupportedModelError(
                f"cache: it holds a prompt that recipe {layer.owner} has shortened, but {owner} is attached; "
                "attach the first one, or start with an empty cache"
            )
        layer.owner = owner


def allocate(layer: CacheLayer | None, removed: int, like: Tensor) -> None:
    """Allocate a static layer's buffer before a compiled prefill, at an address that later graphs may rely on.

    Args:
        layer: a cache layer; nothing is done unless it is static and has no buffer yet.
        removed: tokens of the coming prefill that it will not store.
        like: ``[B, Hkv, 0, d]``, for dtype and device.
    """
    if isinstance(layer, StaticLayer) and not layer.is_initialized:
        _shrink(layer, removed)
        # Its own, from the host, would wait for the device in each layer.
        layer.cumulative_length = torch.zeros((), dtype=torch.int64, device=like.device)
        layer.lazy_initialization(like, like)


def _shrink(layer: StaticLayer, removed: int) -> None:
    if removed:
        layer.max_cache_len -= removed
        layer.shrunk += removed


def forget(layer: CacheLayer, removed: int, slots: Slots) -> None:
    """Note that `removed` tokens of the present forward will never be stored in this layer."""
    layer.slots = slots
    if isinstance(layer, VirtualSlidingLayer):
        layer.cumulative_length += removed
        return
    layer.removed += removed
    if isinstance(layer, VirtualStaticLayer) and not layer.is_initialized:
        _shrink(layer, removed)


def leave(layer: CacheLayer, index: Tensor, slots: Slots) -> None:
    """Keep of what this layer has stored the slots `index` ``[B, m]`` alone; they hold `slots`.

    A static buffer stays as large as it is, at its address, and has room for as many more.
    """
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None, "nothing is stored"
    layer.slots = slots
    if isinstance(layer, VirtualStaticLayer):
        stored, kept = int(layer.cumulative_length), index.shape[1]
        for buffer in (keys, values):
            buffer[:, :, :kept] = _slots_at(buffer, index)
        layer.cumulative_length.sub_(stored - kept)
        layer.removed += stored - kept
        return
    if not isinstance(layer, VirtualSlidingLayer):  # which counts all tokens that it has seen
        layer.removed += int(keys.shape[-2]) - index.shape[1]
    layer.keys, layer.values = _slots_at(keys, index), _slots_at(values, index)


def _slots_at(states: Tensor, index: Tensor) -> Tensor:
    """Keys or values ``[B, H, m, d]`` of `states` ``[B, H, n, d]`` at `index` ``[B, m]``, sample by sample."""
    index = index.to(states.device)
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
