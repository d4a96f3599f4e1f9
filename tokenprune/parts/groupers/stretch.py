"""Groups that are stretches of the raster, served by what their tokens score and by how varied they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram
from tokenprune.core.grids import Grid
from tokenprune.core.groups import Groups, fold, share_by
from tokenprune.core.tokens import Tokens
from tokenprune.parts.groupers.geometric import GeometricGrouper, Parts
from tokenprune.parts.groupers.video import group_means
from tokenprune.parts.work import Work

DECIMALS = 6
"""What is due is rounded to so many, relative to the mean: the order of a sum does not decide between equals."""


class StretchGrouper(GeometricGrouper):
    """So many stretches of each picture or video in raster order, as equal as can be; the first ones may be longer.

    Args:
        parts: stretches of a picture; higher spreads tokens more evenly from top to bottom (HoloV: 16).
        by: stretches are due in proportion to their ``size``, or to the sum of their tokens' ``score``, which is to be
            at least 0 (HoloV). The host then waits for the device once at the stage.
        diversity: with ``score``, how much more a stretch of average variety is due; one whose tokens are unlike each
            other in more various ways is due more than that (HoloV's α).
    """

    def __init__(
        self,
        *,
        parts: Parts = 16,
        by: Literal["size", "score"] = "size",
        diversity: Annotated[float, Field(ge=0, le=100)] = 0.0,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.by = by
        self.diversity = diversity
        self.check()

    @property
    def static(self) -> bool:
        return self.by == "size"

    @property
    def _looks(self) -> bool:
        return self.by == "score" and self.diversity > 0

    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        stretches = [len(part) for part in np.array_split(np.arange(prod(grid)), self.parts) if len(part)]
        index = np.repeat(np.arange(len(stretches)), stretches).reshape(grid)
        return index.astype(np.int64), [(1, 1, length) for length in stretches]

    def forward(self, tokens: Tokens) -> Groups:
        groups = super().forward(tokens)
        if not self._looks or not any(tokens.sizes):
            return groups
        rows = iter(variety(fold(tokens, groups).tokens).tolist())
        return replace(groups, weights=tuple(tuple(next(rows) for _ in own) for own in groups.sizes))

    def share(self, groups: Groups, counts: Sequence[int], scores: Tensor) -> tuple[tuple[int, ...], ...]:
        if self.by == "size":
            return super().share(groups, counts, scores)
        finite = scores.masked_fill(groups.index < 0, 0.0).clamp(min=0)
        means = group_means(finite.unsqueeze(-1), groups).squeeze(-1).cpu().double().numpy()
        shares = []
        for row, (mean, own, count) in enumerate(zip(means, groups.sizes, counts, strict=True)):
            sizes = np.array(own, dtype=np.float64)
            due = _relative(mean[: len(own)], sizes)
            if groups.weights is not None:
                due = due + self.diversity * _relative(np.array(groups.weights[row]), sizes)
            shares.append(tuple(share_by(count, own, (sizes * np.round(due, DECIMALS)).tolist())))
        return tuple(shares)

    def multiply_adds(self, work: Work) -> int:
        """Cosines within stretches, as long as the longest, and sums over their scores: of one picture."""
        if self.by == "size":
            return 0
        many = max(1, min(self.parts, work.tokens))
        longest = -(-work.tokens // many)
        return many * (longest**2 * work.width * self._looks + work.tokens)


def variety(tokens: Tokens) -> Tensor:
    """Of each sample, ``[B]`` float32: mean variance of the cosines of a token with the others; 0 of a lone token."""
    real = tokens.valid
    pairs = real.unsqueeze(1) & real.unsqueeze(2)
    pairs.diagonal(dim1=1, dim2=2).fill_(False)
    alike = gram.cosines(tokens.hidden.masked_fill(~real.unsqueeze(-1), 0.0)) * pairs
    others = pairs.sum(-1).clamp(min=1)
    mean = alike.sum(-1) / others
    variance = ((alike - mean.unsqueeze(-1)).square() * pairs).sum(-1) / others
    return variance.sum(-1) / real.sum(-1).clamp(min=1)


def _relative(x: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers of groups over their mean over all tokens; 0 throughout where that is 0."""
    mean = float((x * sizes).sum() / max(1.0, sizes.sum()))
    return x / mean if mean > 0 else np.zeros_like(x)
