"""Counts by a fixed bar that scores have to clear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.budget import count_of
from tokenprune.core import transfer
from tokenprune.core.grids import Grid
from tokenprune.core.tokens import Tokens
from tokenprune.parts.limits import Share, TokenCount
from tokenprune.parts.schedulers.base import Scheduler
from tokenprune.parts.work import no_products


class ThresholdScheduler(Scheduler):
    """As many tokens as score above a bar: a busy picture keeps more than an empty one.

    For scorers whose scores mean something in themselves, such as learned logits of keeping a token, and for the
    sampler ``top_k``. `tokenprune fit` draws the scores to where `expected` of all tokens clear the bar.

    Args:
        above: the bar; higher keeps fewer. A logit of 0 is a probability of one half.
        at_least: never keep fewer tokens.
        at_most: never keep more than this share of the original tokens.
        expected: share of the original tokens to assume where a budget for the whole recipe replaces the count.
    """

    multiply_adds = no_products

    def __init__(
        self,
        *,
        above: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0,
        at_least: TokenCount = 1,
        at_most: Share = 1.0,
        expected: Share = 0.25,
    ) -> None:
        super().__init__()
        self.above = above
        self.at_least = at_least
        self.at_most = at_most
        self.expected = expected
        self.check()

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return min(float(size), max(float(self.at_least), min(self.expected, self.at_most) * total))

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        most = [
            min(size, max(self.at_least, count_of(self.at_most, total)))
            for size, total in zip(tokens.sizes, tokens.total, strict=True)
        ]
        above = (scores > self.above).sum(1).clamp(min=self.at_least)
        return torch.minimum(above, transfer.ints(most, above.device))
