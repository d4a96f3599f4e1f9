"""Recycling by clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.budget.rule import plain_fraction
from tokenprune.core import gram, ops
from tokenprune.core.merge import Merge
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.density import prominence
from tokenprune.parts.limits import Share
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import Work


class ClusterRecycler(Recycler):
    """Merges the best of the dropped tokens into the centres of their clusters (SparseVLM, density peaks).

    Of the P dropped tokens of a sample, the R with the highest scores are clustered into C, and each cluster becomes
    one token at its centre. Density is that of the C nearest neighbours, the token itself included, and computed as a
    logarithm; of equals the lower index is the denser one. No noise, and no randomness.

    Args:
        share: share of the dropped tokens that is recycled; higher recycles more (τ).
        per_cluster: recycled tokens per merged token; higher gives fewer merged tokens (1/θ).
        plus_one: R = ⌊share·P⌋ + 1 and C = ⌊R/per_cluster⌋ + 1 as in the released code; false leaves off both + 1 (and
            makes at least one token where anything is recycled).
        reduce: a merged token is the ``mean`` of its cluster (released code), or the ``sum`` (equation 10), whose
            length grows with the cluster so that later layers hardly change it.
        metric: tokens join the nearest centre by Euclidean distance ``l2`` (released code) or by ``cosine`` similarity.
        distance_scale: distances are divided by the square root of the ``width`` (released code), or not: ``none``.
            It weighs density against separation when centres are chosen.
    """

    def __init__(
        self,
        *,
        share: Share = 0.3,
        per_cluster: Annotated[int, Field(ge=1, le=1_000_000)] = 10,
        plus_one: bool = True,
        reduce: Literal["mean", "sum"] = "mean",
        metric: Literal["l2", "cosine"] = "l2",
        distance_scale: Literal["width", "none"] = "width",
    ) -> None:
        super().__init__()
        self.share = share
        self.per_cluster = per_cluster
        self.plus_one = plus_one
        self.reduce = reduce
        self.metric = metric
        self.distance_scale = distance_scale
        self.check()
        self._ratio = plain_fraction(share)  # a budget asks for `recycled` thousands of times

    def recycled(self, dropped: int) -> int:
        """R, the tokens that are clustered, of `dropped`."""
        return min(dropped, self._ratio.numerator * dropped // self._ratio.denominator + self.plus_one)

    def added(self, dropped: int) -> int:
        recycled = self.recycled(dropped)
        return min(recycled, max(1, recycled // self.per_cluster + self.plus_one))

    def multiply_adds(self, work: Work) -> int:
        """Distances of recycled tokens from each other (by cosine, from centres too), and sums over the clusters."""
        recycled, clusters = self.recycled(work.dropped), self.added(work.dropped)
        compared = recycled + clusters * (self.metric == "cosine")
        return recycled * work.width * (compared + clusters) + recycled * clusters

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        counts = tokens.counts(count)
        dropped = [size - k for size, k in zip(tokens.sizes, counts, strict=True)]
        recycled = tuple(self.recycled(p) for p in dropped)
        clusters = tuple(self.added(p) for p in dropped)
        if not any(clusters):
            return None
        gone = ~ops.mask_of(kept, scores.shape[1], padded=ops.ragged(counts))
        source = ops.top_k(scores, recycled, gone & tokens.valid if tokens.padded else gone)
        padded = ops.ragged(recycled)
        x = ops.take_rows(tokens.hidden, source.clamp(min=0) if padded else source)
        centres, member = self.clusters(x, source >= 0 if padded else None, clusters)
        if ops.ragged(clusters):
            target = source.gather(1, centres.clamp(min=0)).masked_fill(centres < 0, -1)
        else:
            target = source.gather(1, centres)
        return Merge(
            source=source,
            target=target,
            weight=member.mT.float(),
            hard=True,
            anchors=clusters,
            mean=self.reduce == "mean",
            source_counts=recycled,
        )

    def clusters(self, x: Tensor, valid: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clusters of the rows of `x` by density peaks.

        Args:
            x: ``[B, R, D]`` tokens.
            valid: ``[B, R]`` bool, False on padding; None without.
            counts: clusters of each sample, at most its valid tokens.

        Returns:
            Centres ``[B, C]``, ascending indices into R, -1 where padded; and membership ``[B, R, C]`` bool: each valid
            token in exactly one cluster, each centre in its own.
        """
        apart = gram.distances(x)
        scaled = apart / x.shape[-1] ** 0.5 if self.distance_scale == "width" else apart
        centres = ops.top_k(prominence(scaled, valid, counts), counts, valid)
        real = centres >= 0 if ops.ragged(counts) else None
        at = centres if real is None else centres.clamp(min=0)
        if self.metric == "cosine":  # between unit vectors the nearest is the one of highest cosine
            unit = torch.nn.functional.normalize(x.float(), dim=-1)
            apart = gram.distances(unit, ops.take_rows(unit, at))
        else:
            apart = apart.gather(2, at.unsqueeze(1).expand(-1, x.shape[1], -1))
        if real is not None:
            apart = apart.masked_fill(~real.unsqueeze(1), torch.inf)
        number = torch.arange(centres.shape[1], device=x.device)
        # A centre joins itself, even where an equal token is the centre of a cluster before it.
        joins = ops.put_(apart.argmin(-1), at, number.expand_as(at), real)
        member = joins.unsqueeze(-1) == number
        return centres, member if valid is None else member & valid.unsqueeze(-1)
