"""DeepStack (Qwen3-VL): vision features added behind early layers, at the places of the untouched prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokenprune.engine.forward import Forward
from tokenprune.engine.gather import take

AddFeatures = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states ``[B, n, D]``, vision mask ``[B, L]``, features ``[vision tokens, D]`` to hidden states."""


def survivors_only(original: AddFeatures, forward: Callable[[], Forward | None]) -> AddFeatures:
    """The text model's own sum, for the tokens that are left, and without waiting for the device to index by a mask."""

    def add(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        present = forward()
        if present is None:
            return original(hidden, mask, features)
        mask = mask.to(hidden.device)
        full = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        full = full.masked_scatter(mask[..., None], features.to(hidden.device, hidden.dtype))
        left = present.alive
        if left is None:
            return hidden + full
        added = take(full, left.index, 1)
        return hidden + (added if left.valid is None else added * left.valid[..., None])

    return add
