"""The recycler that drops."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.recyclers.base import Recycler


class DropRecycler(Recycler):
    """Nothing: what is not kept is gone."""

    def added(self, dropped: int) -> int:
        return 0

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> tuple[Tokens, Tensor]:
        return tokens.take(kept, tokens.counts(count)), kept[:, :0]
