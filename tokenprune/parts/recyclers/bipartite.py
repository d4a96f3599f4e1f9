"""Recycling by bipartite matching: some of the dropped tokens stay and take in the others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenprune.budget.rule import plain_fraction
from tokenprune.core import gram, ops, transfer
from tokenprune.core.merge import Merge
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.limits import Share
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.tower import MERGES_BEFORE, merged_before_projector, merging_cost
from tokenprune.parts.work import Work


class BipartiteRecycler(Recycler):
    """Splits the dropped tokens in two and merges one side into the other (VisionZip's contextual tokens).

    Targets are evenly spread over the dropped tokens in raster order; every other dropped token joins the target that
    it is most like. A target becomes itself plus the mean of what joins it, as in the released code, or the plain mean
    of all.

    VisionZip takes every s-th dropped token from the first on, s rounded down, which leaves a tail at the bottom of the
    picture without targets; here they reach to its end.

    Args:
        share: share of the dropped tokens that become targets, rounded down, at least one; higher
            leaves more merged tokens.
        add: true adds the mean of those that join (about twice as long as a token); false takes the mean of all.
        features: tokens are alike by the cosine of their ``hidden`` states at the place, or of their ``keys`` in the
            last block of the tower that is read, mean over heads (VisionZip).
        before_projector: merge what the projector reads, and project that (VisionZip), where the projector takes tokens
            one by one; elsewhere what it gives is merged, and the report says so.
    """

    def __init__(
        self,
        *,
        share: Share = 0.02,
        add: bool = True,
        features: Literal["hidden", "keys"] = "hidden",
        before_projector: bool = False,
    ) -> None:
        super().__init__()
        self.share = share
        self.add = add
        self.features = features
        self.before_projector = before_projector
        self.check()
        self._ratio = plain_fraction(share)

    @property
    def reads(self) -> Needs:
        compares = Needs(tower="keys") if self.features == "keys" else Needs()
        return compares | MERGES_BEFORE if self.before_projector else compares

    def added(self, dropped: int) -> int:
        return min(dropped, max(1, self._ratio.numerator * dropped // self._ratio.denominator))

    def multiply_adds(self, work: Work) -> int:
        """Cosines of dropped tokens and targets, at most as wide as all heads of the tower; and the sums."""
        compared = work.tower_width if self.features == "keys" else work.width
        targets = self.added(work.dropped)
        merged = merging_cost(work, work.dropped, targets, before_projector=self.before_projector)
        return work.dropped * targets * compared + merged

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        return merged_before_projector(tokens, plan) if self.before_projector else super().states(tokens, plan)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        counts = tokens.counts(count)
        dropped = tuple(size - k for size, k in zip(tokens.sizes, counts, strict=True))
        anchors = tuple(self.added(p) for p in dropped)
        if not any(anchors):
            return None
        n = tokens.valid.shape[1]
        gone = tokens.valid & ~ops.mask_of(kept, n, padded=ops.ragged(counts))
        want = transfer.ints(anchors, gone.device)
        source, target = ops.places(gone, dropped), ops.places(ops.evenly(gone, want), anchors)
        x = tokens.signal("keys").float().mean(2) if self.features == "keys" else tokens.hidden
        x = x.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else x
        alike = gram.cosines(ops.take_rows(x, source.clamp(min=0)), ops.take_rows(x, target.clamp(min=0)))
        alike = alike.masked_fill((target < 0).unsqueeze(1), -torch.inf)  # [B, P, A]
        itself = (source.unsqueeze(2) == target.unsqueeze(1)) & (target >= 0).unsqueeze(1)
        number = torch.arange(target.shape[1], device=target.device)
        joins = torch.where(itself.any(2), itself.int().argmax(2), alike.argmax(2))
        member = (joins.unsqueeze(1) == number.unsqueeze(-1)) & (
            (source >= 0).unsqueeze(1) & (target >= 0).unsqueeze(2)
        )
        weight = member.float()
        if self.add:
            others = weight.sum(-1, keepdim=True) - 1
            weight = weight / others.clamp(min=1)
            weight = weight.masked_fill(itself.mT, 1.0)
        return Merge(
            source=source,
            target=target,
            weight=weight,
            hard=not self.add,
            anchors=anchors,
            mean=not self.add,
            source_counts=dropped,
            share=member.float(),
        )
