"""Samplers that go by the scores."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import InputError
from tokenprune.parts.limits import Offset, Stride
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.work import no_products


class TopKSampler(Sampler):
    """The tokens with the highest scores."""

    multiply_adds = no_products

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        return ops.top_k(scores, tokens.counts(count), tokens.valid_if_padded)


class UnionSampler(Sampler):
    """A strided lattice of rows and columns first, then the best scores up to the count.

    With a count below the size of the lattice, its best-scored points. With the scheduler ``lattice``, FEATHER's first
    stage: the union of lattice and best scores, exactly.

    Args:
        stride: every so many rows and columns; higher leaves more to the scores (FEATHER's s).
        offset: first row and column of the lattice, less than the stride.
    """

    reads = Needs(grid=True)
    multiply_adds = no_products

    def __init__(self, *, stride: Stride = 3, offset: Offset = 0) -> None:
        super().__init__()
        self.stride = stride
        self.offset = offset
        self.check()
        if offset >= stride:
            raise InputError(f"sampler 'union': offset {offset} must be less than the stride, {stride}")

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        points = ops.lattice(tokens.cell, tokens.valid, stride=self.stride, offset=self.offset)
        return ops.top_k(scores, tokens.counts(count), tokens.valid_if_padded, prefer=points)
