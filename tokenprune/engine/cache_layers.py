"""Cache layers that store fewer slots than they report, so that masks and positions stay in original coordinates.

transformers sizes masks and positions from the length that a cache reports. A pruned layer stores only the survivors,
yet reports the length of the untouched prompt; masks, padding, position ids and rope deltas then need no correction,
and a pruned layer only gathers rows and columns from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

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
VIRTUAL = {
    DynamicLayer: VirtualDynamicLayer,
    DynamicSlidingWindowLayer: VirtualSlidingLayer,
    StaticLayer: VirtualStaticLayer,
}
"""What takes the place of each kind of layer."""


def _waiting(layer: VirtualLength) -> int:
    """Tokens that wait for the rest of their prompt."""
    return 0 if layer.held is None else len(layer.held)


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
