"""`LayerCall`: a decoder layer that is about to run in a prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.engine.cache_layers import CacheLayer
from tokenprune.engine.forward import Forward
from tokenprune.engine.prompt import Prefill


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A decoder layer that is about to run in a prefill, in that layer's own coordinates."""

    index: int
    hidden: Tensor
    """``[B, L, D]`` that enters it."""
    kwargs: dict[str, Any]
    """What it is called with."""
    store: CacheLayer | None
    forward: Forward
    prefill: Prefill
