"""Counts for the union of a lattice and the best scores."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from torch import Tensor

from tokenprune.budget import count_of
from tokenprune.budget.rule import plain_fraction
from tokenprune.core import ops
from tokenprune.core.grids import Grid
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.limits import Offset, ShareOrNone, Stride
from tokenprune.parts.schedulers.base import StaticScheduler


class LatticeScheduler(StaticScheduler):
    """As many as a strided lattice of rows and columns holds, and as many again as the best scores add to it.

    FEATHER's first stage: the union of the best κn tokens and every third row and column. For the sampler ``union``.

    Args:
        stride: every so many rows and columns; higher keeps fewer (FEATHER's s).
        offset: first row and column of the lattice, less than the stride.
        keep: share of the original tokens that is taken by score; higher keeps more, 0 keeps the lattice alone (κ).
        size: ``exact`` counts the union, whose size depends on the data, as in the paper; ``fixed`` is the size that it
            has on average, so that counts are known from shapes alone.
    """

    reads = Needs(grid=True)

    def __init__(
        self,
        *,
        stride: Stride,
        offset: Offset = 0,
        keep: ShareOrNone = 0.0,
        size: Literal["exact", "fixed"] = "exact",
    ) -> None:
        super().__init__()
        self.stride = stride
        self.offset = offset
        self.keep = keep
        self.size = size
        self.check()
        if offset >= stride:
            raise InputError(f"scheduler 'lattice': offset {offset} must be less than the stride, {stride}")

    @property
    def static(self) -> bool:
        return self.size == "fixed" or self.keep == 0

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        """The size of the union if lattice and scores have nothing to do with each other."""
        points = self._points(total, grids)
        more = plain_fraction(self.keep) * (total - points)
        return float(min(size, max(1, points + int(more + Fraction(1, 2)))))

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        if not self.static:
            raise InputError("scheduler 'lattice' with size 'exact' needs scores; size 'fixed' is known from shapes")
        return min(size, int(self.nominal(size, total=total, grids=grids)))

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        if self.static:
            return super().forward(tokens, scores, raters)
        best = [min(n, count_of(self.keep, total)) for n, total in zip(tokens.sizes, tokens.total, strict=True)]
        chosen = ops.mask_of(ops.top_k(scores, best, tokens.valid_if_padded), scores.shape[1])
        return (chosen | ops.lattice(tokens.cell, tokens.valid, stride=self.stride, offset=self.offset)).sum(1)

    def _points(self, total: int, grids: Sequence[Grid]) -> int:
        """Lattice points in all images of a sample."""
        along = [[len(range(self.offset, side, self.stride)) for side in grid[1:]] for grid in grids]
        return min(total, sum(grid[0] * rows * columns for grid, (rows, columns) in zip(grids, along, strict=True)))
