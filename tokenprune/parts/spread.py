"""Where to put so many tokens on the grids of a sample so that they cover it evenly: plain arithmetic on the host."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

from tokenprune.tokens import Grid


def spread(grids: Sequence[Grid], count: int) -> list[int]:
    """Raster indices of `count` tokens evenly spread over the images `grids`, ascending, without duplicates.

    Images get their share by largest remainder, frames of a video by running quota, and a frame is covered by rows of
    about equally many tokens whose spacing is near the spacing of the rows.

    Args:
        grids: (T, H, W) of each image, in order.
        count: 0 … all tokens.
    """
    index: list[int] = []
    start = 0
    for grid, share in zip(grids, _shares([prod(grid) for grid in grids], count), strict=True):
        frames, height, width = grid
        for frame in range(frames):
            here = _step(frame, frames, share)
            index += [start + cell for cell in _cover(height, width, here)]
            start += height * width
    return index


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` split in proportion to `sizes` by largest remainder; of equal remainders the first gets the token."""
    total = sum(sizes)
    shares = [count * size // total for size in sizes] if total else [0] * len(sizes)
    remainders = [count * size % total if total else 0 for size in sizes]
    neediest = sorted(range(len(sizes)), key=lambda i: -remainders[i])
    for i in neediest[: count - sum(shares)]:
        shares[i] += 1
    return shares


def _step(i: int, parts: int, count: int) -> int:
    """What part i gets when `count` is dealt out evenly over `parts`, neighbours differing by one at most."""
    return (2 * (i + 1) * count + parts) // (2 * parts) - (2 * i * count + parts) // (2 * parts)


def _cover(height: int, width: int, count: int) -> list[int]:
    """`count` cells of one frame, ascending."""
    if count == 0:
        return []
    fewest = -(-count // width)  # rows, when full
    rows = max(fewest, min(height, count, round(sqrt(count * height / width))))
    cells: list[int] = []
    for i in range(rows):
        row, columns = (2 * i + 1) * height // (2 * rows), _step(i, rows, count)
        cells += [row * width + (2 * j + 1) * width // (2 * columns) for j in range(columns)]
    return cells
