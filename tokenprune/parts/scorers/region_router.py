"""A scorer that decides region by region how fine a picture is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.core import ops
from tokenprune.core.cells import Cells
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work

REGION = 4
"""Rows and columns of a region: kept as 1, as 2 × 2 or as 4 × 4 tokens."""
ALWAYS = 20.0
"""Logit of the one token that every region keeps."""


class RegionRouterScorer(Learned, Scorer):
    """How fine each region of 4 × 4 tokens is kept, by logits of a second and of a third scale, from what is in it.

    One token of a region always scores highest. Three more, which make it 2 × 2, share a logit; the other twelve share
    another, never above it. So wherever scores are cut, what is left of a region is one of the scales (or lies between
    two, where a count falls into one). With the scheduler ``threshold`` and the recycler ``pool`` it is FocusLLaVA's
    vision-guided sampler. The logits come from mean and spread of the region's tokens.

    Args:
        dim: width of what is seen of a token; higher tells more apart and costs more.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    reads = Needs(grid=True)

    def __init__(self, *, dim: Width = 64, weights: Weights | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.weights = weights
        self.check()

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.narrow = nn.Linear(host.width, self.dim)
        self.route = nn.Sequential(nn.Linear(2 * self.dim, self.dim), nn.GELU(), nn.Linear(self.dim, 2))

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.ready(tokens)
        second, below = self.route(self._seen(tokens)).unbind(-1)
        row, column = (tokens.cell[..., axis] % REGION for axis in (1, 2))
        once, twice = (row == 1) & (column == 1), (row % 2 == 1) & (column % 2 == 1)
        third = second - functional.softplus(below)
        return tokens.only_valid(torch.where(once, ALWAYS + second.sigmoid(), torch.where(twice, second, third)))

    def _seen(self, tokens: Tokens) -> Tensor:
        """``[B, N, 2 dim]`` mean and spread of the tokens in the region of each token, those that are still there."""
        channels = self.narrow(self.norm(tokens.hidden.float())).masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
        one = tokens.valid.unsqueeze(-1).float()
        padded = functional.pad(torch.cat([channels, channels.square(), one], -1), (0, 0, 0, 1))
        cells = Cells.of(tokens, REGION)
        row, column = (tokens.cell[..., axis] % REGION for axis in (1, 2))
        row, column = row.masked_fill(~tokens.valid, 0), column.masked_fill(~tokens.valid, 0)
        total = torch.zeros_like(padded[:, :-1])
        for number in range(REGION**2):
            total = total + ops.take_rows(padded, cells.around(number // REGION - row, number % REGION - column))
        count = total[..., -1:].clamp(min=1.0)
        mean, square = (total[..., :-1] / count).chunk(2, -1)
        # A root near 0 would make much of rounding, which differs between batches.
        return torch.cat([mean, (square - mean.square()).clamp(min=0.0).add(0.01).sqrt()], -1)

    def multiply_adds(self, work: Work) -> int:
        """The view of each token, and the two layers of the router, which are asked for every token."""
        return work.tokens * self.dim * (work.width + 2 * self.dim + 2)
