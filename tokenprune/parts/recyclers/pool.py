"""Recycling by where tokens lie on the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.merge import Merge
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import Work


class PoolRecycler(Recycler):
    """Averages every survivor with the dropped tokens of its picture that lie nearest to it.

    Behind the sampler ``uniform`` this is average pooling to a coarser grid, of any count. Of survivors equally
    near the last takes the token: `uniform` puts them behind the middle of even blocks. A picture without survivors
    loses its tokens.
    """

    reads = Needs(grid=True)

    def added(self, dropped: int) -> int:
        return 0

    def multiply_adds(self, work: Work) -> int:
        """Distances of three numbers on the grid, and the sums."""
        return work.tokens * work.kept * (3 + work.width)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if counts == tokens.sizes or not any(counts):
            return None
        real = kept >= 0
        at = kept.clamp(min=0)
        cell, own = tokens.cell, ops.take_rows(tokens.cell, at)
        apart = (cell.unsqueeze(2) - own.unsqueeze(1)).square()  # [B, N, K, 3], whole numbers
        near = (apart[..., 1] + apart[..., 2]).float()
        near = near.masked_fill((apart[..., 0] > 0) | ~real.unsqueeze(1), torch.inf)
        number = torch.arange(kept.shape[1], device=kept.device)
        joins = ops.put_(
            kept.shape[1] - 1 - near.flip(2).argmin(-1), at, number.expand_as(at), real
        )  # a survivor joins itself
        finds = (near.gather(2, joins.unsqueeze(-1)).squeeze(-1).isfinite() & tokens.valid).unsqueeze(1)
        source = torch.arange(n, device=kept.device).expand(batch, n)
        return Merge(
            source=source.masked_fill(~tokens.valid, -1) if tokens.padded else source,
            target=kept,
            weight=((joins.unsqueeze(1) == number.unsqueeze(-1)) & finds).float(),
            hard=True,
            anchors=(0,) * batch,
            source_counts=None if tokens.padded else tokens.sizes,
        )
