"""Where to put so many tokens on the grids of a sample so that they cover it evenly: plain arithmetic on the host."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

from tokenprune.core.grids import Grid
from tokenprune.core.groups import share_out

PHASES = ((0, 0), (2, 2), (3, 1), (1, 3))
"""Shifts of rows and columns, in quarters of their spacing. Each side gets every quarter once; of a lattice that takes
every second row and column, they are exactly its four places."""


def spread(grids: Sequence[Grid], count: int, *, phase: int = 0) -> list[int]:
    """Raster indices of `count` tokens evenly spread over the images `grids`, ascending, without duplicates.

    Images get their share by largest remainder, frames of a video by running quota, and a frame is covered by rows of
    about equally many tokens whose spacing is near the spacing of the rows.

    Args:
        grids: (T, H, W) of each image, in order.
        count: 0 … all tokens.
        phase: 0 … 3, which of `PHASES` shifts the layout, cyclically within each row's and column's share of the side;
            0 leaves every token in the middle of its share.
    """
    down, right = ((2 + quarters) % 4 for quarters in PHASES[phase])
    index: list[int] = []
    start = 0
    for grid, share in zip(grids, share_out(count, [prod(grid) for grid in grids]), strict=True):
        frames, height, width = grid
        for frame in range(frames):
            here = _step(frame, frames, share)
            index += [start + cell for cell in _cover(height, width, here, down, right)]
            start += height * width
    return index


def _step(i: int, parts: int, count: int) -> int:
    """What part i gets when `count` is dealt out evenly over `parts`, neighbours differing by one at most."""
    return (2 * (i + 1) * count + parts) // (2 * parts) - (2 * i * count + parts) // (2 * parts)


def _cover(height: int, width: int, count: int, down: int, right: int) -> list[int]:
    """`count` cells of one frame, ascending; `down` and `right` are quarters of a share before each row and column."""
    if count == 0:
        return []
    fewest = -(-count // width)  # rows, when full
    rows = max(fewest, min(height, count, round(sqrt(count * height / width))))
    cells: list[int] = []
    for i in range(rows):
        row, columns = (4 * i + down) * height // (4 * rows), _step(i, rows, count)
        cells += [row * width + (4 * j + right) * width // (4 * columns) for j in range(columns)]
    return cells
