"""Groups that follow from where tokens lie: images, frames, windows, tiles, stretches."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from math import prod
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from tokenprune.core import transfer
from tokenprune.core.grids import Grid
from tokenprune.core.groups import Groups, rectangle
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.groupers.base import Grouper
from tokenprune.parts.limits import Share
from tokenprune.parts.work import no_products

Cells = Annotated[int, Field(ge=1, le=4096)]
"""Rows or columns of a window, in vision tokens."""
Parts = Annotated[int, Field(ge=1, le=64)]
"""Into how many parts a side is cut."""


class GeometricGrouper(Grouper):
    """A grouper that needs the grids alone.

    Where no earlier stage has dropped tokens, sizes are known on the host; else one look at the device tells them.
    """

    reads = Needs(grid=True)
    multiply_adds = no_products

    @abstractmethod
    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        """The group of each cell of one image or video, ``[T, H, W]``, counted from 0; and the grid of each group."""

    def forward(self, tokens: Tokens) -> Groups:
        device, (batch, n) = tokens.valid.device, tokens.valid.shape
        cut = [self.cut(grids) for grids in tokens.grids]
        index = torch.full((batch, max(n, *tokens.total)), -1, dtype=torch.int64)
        for row, (groups, _) in enumerate(cut):
            index[row, : len(groups)] = torch.tensor(groups, dtype=torch.int64)
        grids = tuple(own for _, own in cut)
        if tokens.sizes == tokens.total:
            # A group that nothing has left yet fills its grid.
            return Groups(transfer.upload(index[:, :n], device), tuple(tuple(map(prod, own)) for own in grids), grids)
        origin = tokens.origin.cpu()  # which tokens are left is known on the device alone
        index = index.gather(1, origin.clamp(min=0)).masked_fill(origin < 0, -1)
        sizes = tuple(
            tuple(torch.bincount(row[row >= 0], minlength=len(own)).tolist())
            for row, own in zip(index, grids, strict=True)
        )
        fitted = tuple(
            tuple(rectangle(size, grid) for size, grid in zip(row, own, strict=True))
            for row, own in zip(sizes, grids, strict=True)
        )
        return Groups(transfer.upload(index, device), sizes, fitted)

    # In a compiled model the cut of a picture is a constant, like a plan: one graph a shape.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def cut(self, grids: tuple[Grid, ...]) -> tuple[tuple[int, ...], tuple[Grid, ...]]:
        """The group of every original token of a sample with these pictures, and the grid of every group."""
        groups: list[int] = []
        own: list[Grid] = []
        for grid in grids:
            index, of = self.split(grid)
            groups += (index.ravel() + len(own)).tolist()
            own += of
        return tuple(groups), tuple(own)


class ImageGrouper(GeometricGrouper):
    """A group for each image or video of the prompt (LLaVA-NeXT: one for the overview, one for the tiles).

    Args:
        decay: each older picture is due this share of what the next newer one is due, for its size; lower forgets
            sooner. For many screenshots, the last of which shows what is there now.
    """

    def __init__(self, *, decay: Share = 1.0) -> None:
        super().__init__()
        self.decay = decay
        self.check()

    def forward(self, tokens: Tokens) -> Groups:
        groups = super().forward(tokens)
        if self.decay == 1.0:
            return groups
        weights = [[size * self.decay ** (len(own) - 1 - i) for i, size in enumerate(own)] for own in groups.sizes]
        return replace(groups, weights=tuple(map(tuple, weights)))

    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        return np.zeros(grid, dtype=np.int64), [grid]


class WindowGrouper(GeometricGrouper):
    """Windows of so many rows and columns within each frame; those at the right and bottom may be smaller.

    Args:
        height: rows of a window, in vision tokens; higher gives fewer, larger groups.
        width: columns of a window.
    """

    def __init__(self, *, height: Cells = 6, width: Cells = 6) -> None:
        super().__init__()
        self.height = height
        self.width = width
        self.check()

    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        return blocks(grid, (1, self.height, self.width))


class TileGrouper(GeometricGrouper):
    """So many tiles down and across each frame, as equal as whole rows and columns allow.

    Args:
        rows: tiles from top to bottom; higher gives more, smaller groups.
        columns: tiles from left to right.
    """

    def __init__(self, *, rows: Parts = 2, columns: Parts = 2) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.check()

    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        return blocks(grid, (1, -(-grid[1] // self.rows), -(-grid[2] // self.columns)))


class SegmentGrouper(GeometricGrouper):
    """Stretches of so many frames of a video; an image is one segment.

    Args:
        frames: frames of a segment; higher gives fewer, longer groups.
    """

    def __init__(self, *, frames: Cells = 8) -> None:
        super().__init__()
        self.frames = frames
        self.check()

    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        return blocks(grid, (self.frames, grid[1], grid[2]))


def blocks(grid: Grid, size: tuple[int, int, int]) -> tuple[NDArray[np.int64], list[Grid]]:
    """Cut a grid into blocks of at most `size` (frames, rows, columns), numbered in raster order of the blocks."""
    along = [np.arange(side) // step for side, step in zip(grid, size, strict=True)]
    many = [int(numbers[-1]) + 1 for numbers in along]
    t, h, w = np.ix_(*along)
    index = ((t * many[1] + h) * many[2] + w).astype(np.int64)
    sides = [[int((numbers == i).sum()) for i in range(count)] for numbers, count in zip(along, many, strict=True)]
    grids: list[Grid] = [(a, b, c) for a in sides[0] for b in sides[1] for c in sides[2]]
    assert sum(map(prod, grids)) == index.size
    return index, grids
