"""`Passed`: a layer that has run in a prefill, kept so that one more position can run through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from tokenprune.core import ops
from tokenprune.engine.cache import slots_of
from tokenprune.engine.cache_layers import CacheLayer
from tokenprune.engine.gather import take
from tokenprune.engine.layer_call import LayerCall
from tokenprune.engine.masks import stored_keys
from tokenprune.engine.projections import Rope
from tokenprune.errors import UnsupportedModelError

OWN = ("attention_mask", "position_ids", "position_embeddings")
"""Arguments of a layer that are for each token, and that a further position has of its own."""


class Listener:
    """Stands where a layer looks for its cache and there is none: keeps what would be stored, and changes nothing."""

    def __init__(self) -> None:
        self.states: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.states = keys.detach(), values.detach()
        return keys, values


class Reader:
    """Stands in for a layer's cache while a further position runs: gives the prompt's states, and stores none."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys.to(keys), keys], 2), torch.cat([self.values.to(values), values], 2)


@dataclass(eq=False)
class Passed:
    """A layer that has run in a prefill, as it was called there."""

    layer: nn.Module
    call: LayerCall
    """Without the states that entered, which nobody needs any more."""
    length: int
    """Tokens of this forward that it was given."""
    cache_name: str
    """What the layer calls its cache."""
    listener: Listener | None
    """In place of a cache, where there is none."""
    window: int | None
    """Keys that a query can see, itself included; None: all before it."""
    stored: int
    """Tokens of earlier forwards whose keys stand before this forward's."""
    origin: Tensor | None
    """``[B, K]`` index in the untouched sequence of each key that the layer read; None where there is no window."""
    last: Tensor
    """``[B, 1]`` index in the layer's sequence of the last token of the prompt."""
    shift: Tensor | None
    """``[B]`` what position ids behind the prompt are lower by at this layer; None: nothing."""

    @classmethod
    def of(
        cls, layer: nn.Module, call: LayerCall, cache_name: str, listener: Listener | None, window: int | None
    ) -> Self:
        """The layer of `call`, which is about to run: what its cache holds is not to be told later."""
        forward, last = call.forward, call.prefill.last
        assert last is not None, "the recipe asks where its prompt ends"
        stored, slots, alive = forward.stored(call.store), slots_of(call.store), forward.alive
        origin = None
        if window is not None:
            device = forward.positions.device
            index = torch.arange(forward.length, device=device).expand(forward.batch, -1)
            index = forward.past + (index if alive is None else alive.index)
            before = forward.past if call.store is not None else 0
            keys = stored_keys(slots, before, forward.batch, device).then(index)
            origin = keys.last(stored + index.shape[1]).origin
        shift = None if alive is None else alive.shift
        if shift is None and slots is not None:
            shift = slots.shift
        length, call = call.hidden.shape[1], replace(call, hidden=call.hidden.new_empty(0))
        return cls(layer, call, length, cache_name, listener, window, stored, origin, last, shift)

    def visible(self) -> Tensor:
        """What the position behind the prompt sees of the keys that the layer read: ``[B, 1, 1, K]``, bool or numbers.

        What the last token of the prompt sees, itself included; but a window has moved on by one.

        Raises:
            UnsupportedModelError: an attention whose mask has no rows.
        """
        mask, keys = self.call.kwargs.get("attention_mask"), self.stored + self.length
        if self.call.forward.flash or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            raise UnsupportedModelError(
                "a glimpse behind the prompt is not supported on flash and flex attention, whose masks have no rows; "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )
        if mask is None:
            at = torch.arange(keys, device=self.last.device)
            row = (at <= self.stored + self.last)[:, None, None]
        else:
            row = take(mask, self.last, 2)[..., :keys]
        if self.window is None or self.origin is None:
            return row
        prompt, past = self.call.prefill.prompt, self.call.forward.past
        assert prompt.last is not None
        gone = (self.origin <= past + prompt.last + 1 - self.window)[:, None, None].to(row.device)
        return row & ~gone if row.dtype == torch.bool else row.masked_fill(gone, torch.finfo(row.dtype).min)

    def shown(self, *, biased: bool) -> Tensor:
        """`visible` of this forward's tokens alone, ``[B, 1, 1, L]``; as bool, unless biases of keys count."""
        row = self.visible()[..., self.stored :]
        return row if biased or row.dtype == torch.bool else ops.is_shown(row)

    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, K, d]`` that the layer has stored, earlier forwards' among them.

        Raises:
            UnsupportedModelError: nobody knows them any more.
        """
        keys = self.stored + self.length
        if self.listener is not None:
            states = self.listener.states
            if states is None:
                raise UnsupportedModelError(
                    f"{type(self.layer).__name__} has stored no keys for a glimpse behind the prompt: it ran without a "
                    "cache, as under gradient checkpointing; turn that off, or use a recipe without a glimpse"
                )
            return states
        store: CacheLayer | None = self.call.store
        found = (getattr(store, "keys", None), getattr(store, "values", None))
        if isinstance(found[0], Tensor) and isinstance(found[1], Tensor):
            if isinstance(store, StaticLayer):
                return found[0][:, :, :keys].detach(), found[1][:, :, :keys].detach()
            width = found[0].shape[2]
            if width == keys or (self.window is not None and width < keys):
                return found[0].detach(), found[1].detach()
        raise UnsupportedModelError(
            f"cache: {type(store).__name__} does not hold the prompt's keys as {type(self.layer).__name__} has made "
            "them, and a glimpse behind the prompt reads them; use the default cache"
        )

    def run(self, hidden: Tensor, rope: Rope, ids: Tensor) -> Tensor:
        """What leaves the layer at the position behind the prompt, ``[B, 1, D]``.

        The layer's own hooks do not run: they are for the prompt.

        Args:
            hidden: ``[B, 1, D]`` that enters.
            rope: cos and sin of the position.
            ids: ``[B, 1]`` or ``[3, B, 1]``, its position ids.
        """
        told = dict(self.call.kwargs)
        for name, value in told.items():
            if name not in OWN and isinstance(value, Tensor) and self.length in value.shape[1:2]:
                raise UnsupportedModelError(
                    f"{type(self.layer).__name__} takes {name} for each token of the prompt, which a glimpse behind it "
                    "has none of; use a recipe without a glimpse"
                )
        keys, values = self.states()
        row = self.visible()[..., -keys.shape[2] :]
        itself = torch.ones_like(row[..., :1]) if row.dtype == torch.bool else torch.zeros_like(row[..., :1])
        given = told.get("position_ids")
        if given is not None:
            ids = ids.amax(0) if given.dim() == 2 and ids.dim() == 3 else ids
            told["position_ids"] = ids
        told |= {
            "attention_mask": torch.cat([row, itself], -1),
            "position_embeddings": rope,
            self.cache_name: Reader(keys, values),
        }
        layer: Any = self.layer
        left = layer.forward(hidden, **told)
        return left[0] if isinstance(left, tuple) else left
