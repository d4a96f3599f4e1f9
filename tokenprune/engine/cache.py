"""Cache layers that store fewer slots than they report, so that masks and positions stay in original coordinates.

transformers sizes masks and positions from the length that a cache reports. A pruned layer stores only the survivors,
yet reports the length of the untouched prompt; masks, padding, position ids and rope deltas then need no correction,
and a pruned layer only gathers rows and columns from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from tokenprune.errors import InputError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Slots:
    """What the slots of a pruned cache layer hold. Tokens that come after a prefill are stored densely behind them."""

    origin: Tensor
    """``[B, n]`` int64, index of each slot's token in the untouched sequence."""
    valid: Tensor | None
    """``[B, n]`` bool, False on padding (on the left), where rows kept different numbers; None without."""
    tail: int
    """Index, in the untouched sequence, of the first token stored behind these slots."""
    shift: Tensor | None = None
    """``[B]`` int64 to subtract from later position ids, where survivors were renumbered behind earlier tokens."""
    bias: Tensor | None = None
    """``[B, n]`` float32, added to the attention logits of every later query with these keys; None: nothing is."""

    @property
    def plain(self) -> bool:
        """Whether a decode step needs no other arguments than the untouched layer's, as long as it gets no mask."""
        return self.valid is None and self.shift is None and self.bias is None

    def at(self, rows: Tensor) -> Slots:
        """The same for the batch rows `rows`, as beam search and batch selection reorder them."""
        rows = rows.to(self.origin.device)
        return Slots(
            self.origin[rows],
            None if self.valid is None else self.valid[rows],
            self.tail,
            None if self.shift is None else self.shift[rows],
            None if self.bias is None else self.bias[rows],
        )

    def cropped(self, length: int) -> Slots:
        """Slots left when the untouched sequence is cut back to `length`, inside the text behind the last image."""
        cut = self.tail - length
        if cut <= 0:
            return self
        valid, bias = (None if x is None else x[:, :-cut] for x in (self.valid, self.bias))
        return Slots(self.origin[:, :-cut], valid, length, self.shift, bias)


class Owner:
    """The attached recipe that has shortened a cache; no other forward can read what is left there.

    Args:
        recipe: its name.
        fingerprint: what it does.
        running: whether a forward under the recipe is on its way in the calling thread; None: it has been left behind
            in another process.
    """

    def __init__(self, recipe: str, fingerprint: str, running: Callable[[], bool] | None) -> None:
        self.recipe = recipe
        self.fingerprint = fingerprint
        self.running = running

    def check(self) -> None:
        """Raise `UnsupportedModelError` unless a forward under this recipe asks."""
        if self.running is None or not self.running():
            raise UnsupportedModelError(
                f"cache: it holds a prompt that recipe {self} has shortened, and that recipe is not attached "
                "to the model that now reads it; attach it again, or start with an empty cache"
            )

    def __str__(self) -> str:
        return f"{self.recipe!r} ({self.fingerprint})"

    def __deepcopy__(self, memo: Any) -> Owner:
        return self  # a copied cache belongs to the same recipe

    def __reduce__(self) -> Any:
        return Owner, (self.recipe, self.fingerprint, None)


class VirtualLength(CacheLayerMixin):
    """Mixin of a cache layer whose reported length exceeds what it stores by `removed`.

    It derives from the common base of all cache layers, or Python would refuse to swap a layer's class for one with it.
    """

    removed: int
    slots: Slots | None
    owner: Owner
    held: Sized | None = None
    """Tokens of a prompt in chunks that wait for its last one (engine/chunks.py); they count as stored."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.held is not None:
            raise UnsupportedModelError(
                f"cache: it holds back {len(self.held)} tokens of a prompt in chunks, whose recipe was detached before "
                "the last chunk came; start the prompt anew"
            )
        if self.slots is not None:
            self.owner.check()
        updated: tuple[Tensor, Tensor] = super().update(*args, **kwargs)
        return updated

    def crop(self, tokens_to_remove: int) -> None:
        if self.slots is not None:
            _check_crop(self.slots, int(self.get_seq_length()) - abs(tokens_to_remove), self.owner)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.slots is not None:
            self.slots = self.slots.at(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.slots is not None:
            self.slots = self.slots.at(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.slots is not None:
            rows = torch.arange(self.slots.origin.shape[0], device=self.slots.origin.device)
            self.slots = self.slots.at(rows.repeat_interleave(repeats))


class VirtualDynamicLayer(VirtualLength, DynamicLayer):
    """A dynamic layer that reports the untouched length."""

    def get_seq_length(self) -> int:
        stored: int = super().get_seq_length()
        # An empty layer reports 0, or generate() would believe in a past.
        return (stored + self.removed if stored else 0) + _waiting(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.removed, self.slots, self.held = 0, None, None


class VirtualSlidingLayer(VirtualLength, DynamicSlidingWindowLayer):
    """A dynamic layer with a window that counts the untouched tokens.

    It keeps as many of the last survivors as the window has room for, which go further back than the window does: the
    mask hides those that lie before it.
    """

    cumulative_length: int

    def crop(self, tokens_to_remove: int) -> None:
        before, stored = self.cumulative_length, self.keys.shape[-2]
        super().crop(tokens_to_remove)
        if before < self.sliding_window:  # it has taken what it stores for its length
            self.cumulative_length = before - (stored - self.keys.shape[-2])

    def reset(self) -> None:
        super().reset()
        self.removed, self.slots = 0, None


class VirtualStaticLayer(VirtualLength, StaticLayer):
    """A static layer whose buffer holds the survivors and what follows them, and that reports the untouched length."""

    shrunk: int
    """Slots saved in the buffer, taken off `max_cache_len` before it was allocated."""

    def get_seq_length(self) -> int | Tensor:
        return (self.cumulative_length + self.removed if self.is_initialized else 0) + _waiting(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # A compiled prefill finds the buffer smaller already, though nothing has been removed yet.
        return self.max_cache_len + max(self.removed, self.shrunk), 0

    def get_max_length(self) -> int:
        return int(self.max_cache_len + self.shrunk)

    def reset(self) -> None:
        super().reset()
        if self.shrunk:
            # The next prompt may keep more, so its buffer is allocated anew.
            self.max_cache_len += self.shrunk
            self.keys = self.values = None
            self.is_initialized = False
        self.removed, self.shrunk, self.slots, self.held = 0, 0, None, None


CacheLayer = VirtualDynamicLayer | VirtualSlidingLayer | VirtualStaticLayer
_VIRTUAL = {
    DynamicLayer: VirtualDynamicLayer,
    DynamicSlidingWindowLayer: VirtualSlidingLayer,
    StaticLayer: VirtualStaticLayer,
}


def _waiting(layer: VirtualLength) -> int:
    """Tokens that wait for the rest of their prompt."""
    return 0 if layer.held is None else len(layer.held)


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
        if type(layer) not in _VIRTUAL and not isinstance(layer, VirtualLength):
            known = ", ".join(cls.__name__ for cls in _VIRTUAL)
            raise UnsupportedModelError(
                f"cache: {type(layer).__name__} cannot hold a shortened sequence; expected one of {known}. "
                "Use the default cache"
            )


def virtualise(layer: CacheLayer | None, owner: Owner | None = None) -> None:
    """Let this one cache layer report the untouched length (its own class is swapped, transformers is not touched)."""
    if layer is None:
        return
    if not isinstance(layer, VirtualLength):
        layer.__class__ = _VIRTUAL[type(layer)]
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


def _check_crop(slots: Slots, length: int, owner: Owner) -> None:
    """Raise `InputError` if cutting back to `length` would take other tokens off than those at the end."""
    cut = slots.tail - length
    if cut <= 0:
        return
    last = torch.arange(length, slots.tail, device=slots.origin.device)
    if length < 0 or cut > slots.origin.shape[1] or not bool((slots.origin[:, -cut:] == last).all()):
        raise InputError(
            f"cache: crop to {length} tokens reaches into pictures that recipe {owner} has shortened; "
            "start with an empty cache"
        )


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
