"""The recycler that drops."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.merge import Merge
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import no_products


class DropRecycler(Recycler):
    """Nothing: what is not kept is gone."""

    multiply_adds = no_products

    def added(self, dropped: int) -> int:
        return 0

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        return None
