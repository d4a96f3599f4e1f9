"""Scores from optimal transport between what entered a layer and what it made of it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram, ops, transfer
from tokenprune.core.greedy import WIDE
from tokenprune.core.grids import Grid
from tokenprune.core.needs import Needs, earlier_signal
from tokenprune.core.tokens import Tokens
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work

Factor = Annotated[float, Field(ge=0, le=1000)]


class TransportScorer(Scorer):
    """How much of what the last layer has added can be had from a token: its share of a transport plan (TopV).

    Sources are the tokens as they entered that layer, targets what it has added to each. Bringing source i to target j
    costs ``features · |s - t|² + places · (1 - exp(-d² / 2 spread²)) + centre · e``, where d is how far they are apart
    on the picture in vision tokens and e how far i is from its middle, each brought to 0 … 1 within the sample; another
    picture is infinitely far. Every target asks for the same, softmax over the sources of ``-cost / temperature``; a
    token's score is the mean of what is asked of it. In the plan as printed the sources' side is settled last: each
    then gives exactly what it has, whatever the cost, and all scores are the same. This plan leaves the sources free.

    Args:
        features: weight of the distance of features (α).
        places: weight of the distance on the picture (β).
        centre: weight of the distance from the middle of the picture (γ); higher favours the middle.
        spread: vision tokens; higher calls farther ones near (σ).
        temperature: of the softmax; lower asks the cheapest source alone (ε).
    """

    reads = Needs(earlier=(1,), grid=True)

    def __init__(
        self,
        *,
        features: Factor = 1.0,
        places: Factor = 1.0,
        centre: Factor = 0.01,
        spread: Annotated[float, Field(ge=0.01, le=1000)] = 10.0,
        temperature: Annotated[float, Field(ge=1e-4, le=1000)] = 0.1,
    ) -> None:
        super().__init__()
        self.features = features
        self.places = places
        self.centre = centre
        self.spread = spread
        self.temperature = temperature
        self.check()

    def multiply_adds(self, work: Work) -> int:
        """Distances of all pairs by features; those on the picture are no product."""
        return work.tokens**2 * work.width

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        real = tokens.valid
        pairs = real.unsqueeze(1) & real.unsqueeze(2)
        source = tokens.signal(earlier_signal(1)).float().where(real.unsqueeze(-1), 0.0)
        target = tokens.hidden.float().where(real.unsqueeze(-1), 0.0) - source
        where = tokens.cell[..., 1:].float()
        row, column = where.unbind(-1)  # small whole numbers: exact
        far = (row.unsqueeze(2) - row.unsqueeze(1)).square() + (column.unsqueeze(2) - column.unsqueeze(1)).square()
        far = far / (2 * self.spread**2)
        other = tokens.cell[:, :, None, 0] != tokens.cell[:, None, :, 0]
        apart = torch.where(other, 1.0, -torch.expm1(-far))
        middles = transfer.upload(_middles(tokens.grids), where.device)
        frame = tokens.cell[..., 0].where(real, 0)
        off = (where - ops.take_rows(middles, frame)).square().sum(-1, keepdim=True).sqrt()  # [B, sources, 1]
        cost = self.features * _to_one(gram.squares(source, target), pairs)
        cost = cost + self.places * _to_one(apart, pairs) + self.centre * _to_one(off, real.unsqueeze(-1))
        # Wide, so that the order of sums does not decide between tokens that mirror each other, in any batch.
        cost = cost.to(WIDE[cost.device.type == "mps"])
        asked = torch.where(real.unsqueeze(-1), -cost / self.temperature, torch.finfo(cost.dtype).min).softmax(1)
        share = asked.where(pairs, 0.0).sum(2) / real.sum(1, keepdim=True).clamp(min=1)
        return tokens.only_valid(share.float())


def _to_one(x: Tensor, real: Tensor) -> Tensor:
    """`x` ``[B, R, C]`` brought to 0 … 1 over the `real` entries of each sample; 0 where all are equal."""
    if not x.shape[1]:
        return x
    low = x.masked_fill(~real, torch.inf).amin((1, 2), keepdim=True)
    width = x.masked_fill(~real, -torch.inf).amax((1, 2), keepdim=True) - low
    return torch.where(width > 0, (x - low) / width.clamp(min=torch.finfo(x.dtype).tiny), 0.0)


# In a compiled model the middles of a picture are a constant, like a plan: one graph a shape.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _middles(grids: tuple[tuple[Grid, ...], ...]) -> Tensor:
    """``[B, F, 2]`` float32, row and column of the middle of each frame of each sample, 0 padded; F at least 1."""
    each = [[((h - 1) / 2, (w - 1) / 2) for t, h, w in own for _ in range(t)] for own in grids]
    most = max([1, *map(len, each)])
    return torch.tensor([[*own, *[(0.0, 0.0)] * (most - len(own))] for own in each]).view(len(each), most, 2)
