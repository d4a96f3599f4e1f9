"""Counts by comparison with tokens of reference."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.tokens import Tokens
from tokenprune.parts.limits import Share, TokenCount
from tokenprune.parts.schedulers.base import ExpectingScheduler
from tokenprune.parts.work import no_products


class AboveReferenceScheduler(ExpectingScheduler):
    """As many tokens as score above a reference: the mean score of the tokens with the longest hidden states.

    Such tokens serve a model as registers, which gather attention that says nothing about the picture; what scores
    above them tells more than nothing (OccamToken's relative test). For the sampler ``top_k``: the best are kept.

    Args:
        registers: tokens of reference; higher makes the reference steadier.
        factor: what is compared is the score with the reference times this; higher keeps fewer.
        at_least: never keep fewer tokens.
        expected: share of the original tokens to assume where a budget for the whole recipe replaces the count.
    """

    multiply_adds = no_products

    def __init__(
        self,
        *,
        registers: Annotated[int, Field(ge=1, le=64)] = 4,
        factor: Annotated[float, Field(gt=0, le=1000)] = 1.0,
        at_least: TokenCount = 1,
        expected: Share = 0.25,
    ) -> None:
        super().__init__()
        self.registers = registers
        self.factor = factor
        self.at_least = at_least
        self.expected = expected
        self.check()

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        length = tokens.only_valid(tokens.hidden.float().norm(dim=-1))
        counted = [min(self.registers, size) for size in tokens.sizes]
        register = ops.mask_of(ops.top_k(length, counted, tokens.valid_if_padded), scores.shape[1])
        known = scores.masked_fill(~register, 0.0)
        reference = known.sum(1, keepdim=True) / register.sum(1, keepdim=True).clamp(min=1)
        above = (scores > reference * self.factor) & tokens.valid
        return torch.minimum(above.sum(1).clamp(min=self.at_least), tokens.valid.sum(1))
