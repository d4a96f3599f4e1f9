"""Recycling by a learned convolution over what each survivor stands for."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.core import ops
from tokenprune.core.merge import Merge, merge, only
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.recyclers.pool import PoolRecycler
from tokenprune.parts.work import Work


class ConvolutionRecycler(Learned, PoolRecycler):
    """Average pooling onto the survivors, plus what a learned convolution finds in the tokens that each one stands for.

    ``state = mean(block) + E gelu(mean over the block of kernel[offset] ∘ R norm(x))``: a pointwise, a depthwise and a
    pointwise convolution. E starts at 0, so that training starts exactly at `pool`. An average forgets where in its
    block something was; the kernel need not. FCoT-VL's compressor, of any ratio.

    Args:
        dim: channels of the convolution; higher keeps more of a block and costs more.
        reach: rows and columns from the survivor that have a weight of their own; tokens beyond share the outermost.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(
        self, *, dim: Width = 64, reach: Annotated[int, Field(ge=1, le=8)] = 1, weights: Weights | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.reach = reach
        self.weights = weights
        self.check()

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.narrow = nn.Linear(host.width, self.dim)
        self.kernel = nn.Parameter(torch.randn((2 * self.reach + 1) ** 2, self.dim))
        self.expand = nn.Linear(self.dim, host.width)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        self.ready(tokens)
        plan, counts = super().forward(tokens, kept, scores, count), tokens.counts(count)
        # A block of one token is that token's, but a survivor of a sample that loses nothing stays as it is.
        return plan and only(plan, [k < size for k, size in zip(counts, tokens.sizes, strict=True)])

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        source = plan.sources
        channels = self.narrow(self.norm(ops.take_rows(tokens.hidden, source).float()))
        weighed = plan.weight @ (channels * self.kernel[self._offset(tokens, plan, source)])
        weighed = weighed / plan.weight.sum(-1, keepdim=True).clamp(min=1.0)
        return merge(tokens.hidden, plan) + self.expand(functional.gelu(weighed))

    def _offset(self, tokens: Tokens, plan: Merge, source: Tensor) -> Tensor:
        """``[B, P]`` which entry of the kernel each source meets: by rows and columns from its survivor."""
        own = ops.take_rows(tokens.cell, plan.target.clamp(min=0))
        apart = ops.take_rows(tokens.cell, source) - ops.take_rows(own, plan.weight.argmax(1))
        row, column = (apart.clamp(-self.reach, self.reach) + self.reach)[..., 1:].unbind(-1)
        return row * (2 * self.reach + 1) + column

    def multiply_adds(self, work: Work) -> int:
        """Pooling, the two pointwise convolutions, and the sums over blocks."""
        narrow = self.dim * (work.width * (work.tokens + work.kept) + work.tokens * work.kept)
        return super().multiply_adds(work) + narrow
