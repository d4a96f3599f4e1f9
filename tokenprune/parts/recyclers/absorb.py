"""Recycling by what survivors take in from around them, however often a token is taken."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram, ops
from tokenprune.core.merge import Merge
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.limits import TowerBlock
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.tower import MERGES_BEFORE, merged_before_projector, merging_cost, signal_of
from tokenprune.parts.work import Work

LEAST = 1e-30
"""A score at or below 0 weighs so much: next to nothing, and a mass still goes somewhere."""


class AbsorbRecycler(Recycler):
    """Every survivor takes in the tokens most like it, and one more token what was dropped, weighted by scores.

    A survivor becomes itself plus the sum of its neighbours, kept or dropped, each times its score; a token may be
    taken in by many, and none is divided by the weights: PruMerge. What was dropped is summed up, too, each token times
    its score, at the place of the one with the highest. Masses flow in proportion to the weights.

    Args:
        neighbours: tokens that each survivor takes in; higher mixes more.
        features: tokens are alike by the cosine of their ``hidden`` states at the place, or of their ``keys`` in a
            block of the vision tower, all heads together (PruMerge).
        block: of the tower, with ``keys``: from 0, from the end below 0, or a share of its depth; null: the last that
            is read.
        rest: whether there is the one more token.
        before_projector: as in the recycler ``bipartite``.
    """

    def __init__(
        self,
        *,
        neighbours: Annotated[int, Field(ge=1, le=4096)] = 32,
        features: Literal["hidden", "keys"] = "hidden",
        block: TowerBlock = None,
        rest: bool = True,
        before_projector: bool = False,
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.features = features
        self.block = block
        self.rest = rest
        self.before_projector = before_projector
        self.check()
        self._keys = signal_of(self, "keys", block)

    @property
    def reads(self) -> Needs:
        compares = Needs(tower=self._keys) if self.features == "keys" else Needs()
        return compares | MERGES_BEFORE if self.before_projector else compares

    def added(self, dropped: int) -> int:
        return min(dropped, int(self.rest))

    def multiply_adds(self, work: Work) -> int:
        """Cosines of survivors and all tokens, and the sums over all tokens, which a product takes."""
        compared = work.tower_width if self.features == "keys" else work.width
        targets = work.kept + self.added(work.dropped)
        merged = merging_cost(work, work.tokens, targets, before_projector=self.before_projector)
        return work.tokens * work.kept * compared + merged

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        return merged_before_projector(tokens, plan) if self.before_projector else super().states(tokens, plan)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if counts == tokens.sizes:
            return None
        anchors = tuple(self.added(size - k) for size, k in zip(tokens.sizes, counts, strict=True))
        survives = ops.mask_of(kept, n, padded=ops.ragged(counts))
        gone = tokens.valid & ~survives
        amount = scores.clamp(min=LEAST).masked_fill(~tokens.valid, 0.0)
        source = torch.arange(n, device=kept.device).expand(batch, n)
        target, weight = kept, self._taken(tokens, kept, amount)
        if self.rest:
            anchor = torch.where(gone, scores, -torch.inf).argmax(1, keepdim=True)
            target = torch.cat([anchor, kept], 1)
            weight = torch.cat([(amount * gone).unsqueeze(1), weight], 1)
        if min(size - k for size, k in zip(tokens.sizes, counts, strict=True)) == 0:
            loses = gone.any(1)  # a sample that loses nothing stays as it is
            target = target.masked_fill(~loses.unsqueeze(1), -1)
            weight = weight * loses[:, None, None]
        return Merge(
            source=source.masked_fill(~tokens.valid, -1) if tokens.padded else source,
            target=target,
            weight=weight,
            mean=False,
            anchors=anchors,
            source_counts=None if tokens.padded else tokens.sizes,
            share=weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny),
        )

    def _taken(self, tokens: Tokens, kept: Tensor, amount: Tensor) -> Tensor:
        """``[B, K, N]`` how much of each token each survivor takes: 1 of itself; 0 on padding."""
        x = (tokens.signal(self._keys).flatten(2) if self.features == "keys" else tokens.hidden).detach()
        x = x.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else x
        itself = torch.nn.functional.one_hot(kept.clamp(min=0), x.shape[1]).bool()
        other = tokens.valid.unsqueeze(1) & ~itself
        alike = gram.cosines(ops.take_rows(x, kept.clamp(min=0)), x).masked_fill(~other, -torch.inf)
        nearest = alike.sort(dim=2, descending=True, stable=True).indices[..., : self.neighbours]
        near = torch.zeros_like(other).scatter(2, nearest, True) & other
        return (near * amount.unsqueeze(1) + itself) * (kept >= 0).unsqueeze(-1)
