"""Grids: frames, rows and columns of the vision tokens of a picture or a video, and what kinds of them there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import InputError

Grid = tuple[int, int, int]
"""Frames, rows and columns (T, H, W) of one image or video, in vision tokens."""


class Tiles(NamedTuple):
    """A `Grid` that shows the picture of the grid before it, its overview, once more in tiles (LLaVA-NeXT).

    The last token of each row is a separator and lies on no part of the picture. Equals and unpacks like any grid.
    """

    frames: int
    rows: int
    columns: int
    """Tokens per row, the separator included."""


class ClassToken(NamedTuple):
    """A `Grid` of one token that lies on no part of the picture: the tower's class token, before the picture's own, or
    the separator behind a video (LLaVA-OneVision)."""

    frames: int = 1
    rows: int = 1
    columns: int = 1


class UnknownGrid(NamedTuple):
    """A `Grid` that stands in where nothing tells that of the pictures: one row of all vision tokens of a sample.

    The engine reports it, and hands it to nobody.
    """

    frames: int
    rows: int
    columns: int


def square_or_row(n: int) -> Grid:
    """The grid of `n` vision tokens of which nothing else is known: a square if they fill one, else one row."""
    side = math.isqrt(max(n, 0))
    return (1, side, side) if side * side == n else (1, 1, n)


def grid_of(n: int, grid: Grid | tuple[int, int] | None) -> Grid:
    """The grid of `n` vision tokens, from what the caller says of it: `square_or_row` where that is nothing.

    Raises:
        InputError: the grid holds another number of tokens.
    """
    if grid is None:
        return square_or_row(n)
    shape: Grid = (1, *grid) if len(grid) == 2 else grid
    if shape[0] * shape[1] * shape[2] != n:
        raise InputError(f"grid {grid} holds {shape[0] * shape[1] * shape[2]} tokens, but there are {n}")
    return shape


def cells_of(grids: Sequence[Sequence[Grid]], n: int) -> Tensor:
    """``[B, n, 3]`` image or frame, row and column of every vision token; 0 on padding. On the host."""
    cells = np.zeros((len(grids), n, 3), dtype=np.int64)
    for row, images in enumerate(grids):
        if row and images == grids[row - 1]:
            cells[row] = cells[row - 1]
            continue
        frame, at = 0, 0
        for grid in images:
            size = math.prod(grid)
            own = cells[row, at : at + size]
            own[:] = np.stack(np.unravel_index(np.arange(size), grid), axis=-1)
            own[:, 0] += frame
            frame, at = frame + grid[0], at + size
    return torch.from_numpy(cells)


def pictures_of(grids: Sequence[Grid]) -> tuple[tuple[Grid, ...], ...]:
    """The grids of each picture or video: tiles belong to the overview before them, a token of no place to the picture
    that it leads or ends, as the first picture shows.

    Raises:
        InputError: where the tokens of a prompt lie is not known.
    """
    leads = bool(grids) and isinstance(grids[0], ClassToken)
    found: list[list[Grid]] = []
    for at, grid in enumerate(grids):
        if isinstance(grid, UnknownGrid):
            raise InputError("it is not known which vision tokens belong to which picture")
        joins = isinstance(grid, Tiles) or (isinstance(grid, ClassToken) and not leads)
        if joins or (leads and at and isinstance(grids[at - 1], ClassToken)):
            found[-1].append(grid)
        else:
            found.append([grid])
    return tuple(map(tuple, found))
