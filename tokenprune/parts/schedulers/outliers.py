"""Counts by how many scores stand out."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import transfer
from tokenprune.core.tokens import Tokens
from tokenprune.parts.limits import Share, TokenCount
from tokenprune.parts.schedulers.base import ExpectingScheduler
from tokenprune.parts.work import no_products


class OutliersScheduler(ExpectingScheduler):
    """As many tokens as have outlying scores: a picture with much to look at keeps more than a plain one (PruMerge).

    A score is outlying if it is above the third quartile of the sample by more than `factor` times the distance between
    first and third quartile.

    Args:
        factor: higher keeps fewer.
        times: so many tokens for each outlier; PruMerge+ keeps about three others for each.
        at_least: never keep fewer tokens.
        expected: share of the original tokens to assume where a budget for the whole recipe replaces the count.
    """

    multiply_adds = no_products

    def __init__(
        self,
        *,
        factor: Annotated[float, Field(ge=0, le=1000)] = 1.5,
        times: Annotated[int, Field(ge=1, le=64)] = 1,
        at_least: TokenCount = 1,
        expected: Share = 0.055,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.times = times
        self.at_least = at_least
        self.expected = expected
        self.check()

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        sizes = transfer.ints(tokens.sizes, scores.device).unsqueeze(1)
        if not scores.shape[1]:
            return sizes.squeeze(1)
        ordered = scores.masked_fill(~tokens.valid, torch.inf).sort(dim=1).values
        first, third = (_quartile(ordered, sizes, quarters) for quarters in (1, 3))
        bar = third + self.factor * (third - first)
        outlying = ((scores > bar) & tokens.valid).sum(1)
        return torch.minimum((self.times * outlying).clamp(min=self.at_least), sizes.squeeze(1))


def _quartile(ordered: Tensor, sizes: Tensor, quarters: int) -> Tensor:
    """``[B, 1]`` the value that so many quarters of the first `sizes` ``[B, 1]`` entries of a row are below, between
    neighbours in proportion; 0 for a row of none."""
    place = quarters * (sizes - 1).clamp(min=0)
    low = ordered.gather(1, place // 4)
    high = ordered.gather(1, torch.minimum(place // 4 + 1, (sizes - 1).clamp(min=0)))
    between = low + (high - low) * (place % 4).to(ordered.dtype) / 4
    return torch.where(sizes > 0, between, 0.0)
