"""DeepStack (Qwen3-VL): vision features added behind early layers, at the places of the untouched prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokenprune.models.forward import Alive
from tokenprune.models.gather import take

AddFeatures = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states ``[B, n, D]``, vision mask ``[B, L]``, features ``[vision tokens, D]`` to hidden states."""


def survivors_only(original: AddFeatures, alive: Callable[[], Alive | None]) -> AddFeatures:
    """The text model's own method while every token stands; else the same sum, for the tokens that are left."""

    def add(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        left = alive()
        if left is None:
            return original(hidden, mask, features)
        mask = mask.to(hidden.device)
        full = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        full = full.masked_scatter(mask[..., None], features.to(hidden.device, hidden.dtype))
        added = take(full, left.index, 1)
        return hidden + (added if left.valid is None else added * left.valid[..., None])

    return add
