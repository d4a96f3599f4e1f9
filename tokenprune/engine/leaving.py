"""Caches that lose tokens once the prefill is over: what a stage has dropped, in layers that have run for them.

Those below it (``kv: all_layers``), and those from it on where what is dropped stays in the sequence (``dropped:
skip_ffn``). What they computed of the survivors has seen the dropped ones. Tokens behind the prompt find them gone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.engine.alive import Alive
from tokenprune.engine.cache import layer_of, leave, slots_of, virtualise, window_of
from tokenprune.engine.cache_layers import Owner, Slots
from tokenprune.engine.gather import take
from tokenprune.engine.masks import stored_keys


@dataclass(eq=False)
class Leaving:
    """Layers, and what their caches are left with."""

    cache: Any | None
    layers: range
    alive: Alive
    """What still stands."""
    seen: bool
    """Whether tokens of the prompt have seen in these layers what leaves them, text among them."""

    def forget(self, past: int, length: int, owner: Owner, recurrent: Collection[int]) -> None:
        """Take what does not stand any more out of the layers' caches.

        Args:
            past: tokens that came before this forward; all of them stay.
            length: tokens of this forward.
            owner: of the shortened caches.
            recurrent: layers with a state instead of keys, which keeps what it has read.
        """
        known: dict[tuple[int, int], tuple[Tensor, Slots]] = {}  # neighbours share theirs
        for number in self.layers:
            layer = None if number in recurrent else layer_of(self.cache, number)
            keys = None if layer is None else layer.keys
            if layer is None or keys is None:
                continue
            slots = slots_of(layer)
            shown = int(keys.shape[-2]) if window_of(layer) is not None else past + length
            of = id(slots), shown
            if of not in known:
                known[of] = self._left(slots, shown, past, length, keys.shape[0])
            virtualise(layer, owner)
            leave(layer, *known[of])

    def _left(self, slots: Slots | None, shown: int, past: int, length: int, batch: int) -> tuple[Tensor, Slots]:
        """Which of a layer's slots stay, ``[B, m]``, and what they hold. A window holds the `shown` last tokens."""
        device = self.alive.index.device  # keys may wait on the host
        keys = stored_keys(slots, past + length, batch, device).last(shown)
        stands = torch.zeros(batch, length, dtype=torch.bool, device=device)
        stands = ops.put_(stands, self.alive.index, True, self.alive.valid)
        own = keys.origin - past
        stays = (own < 0) | stands.gather(1, own.clamp(min=0))
        if keys.valid is not None:
            stays = stays & keys.valid
        counted = stays.cumsum(1)
        # The host waits for the device, once behind the prefill: how many a window has held, only the data tell.
        counts = counted[:, -1].tolist()
        m = max(counts)
        number, there = torch.arange(1, m + 1, device=device)[None], None
        if ops.ragged(counts):  # padded on the left, as everywhere
            number = number - (m - counted[:, -1:])
            there = number > 0
        at = ops.reaching(counted, number)
        bias = None if keys.bias is None else take(keys.bias, at, 1)
        shift = None if slots is None else slots.shift
        return at, Slots(take(keys.origin, at, 1), there, past + length, shift, bias)
