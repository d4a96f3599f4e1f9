"""The grid of a video whose frames all have one size."""

from __future__ import annotations

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError


def whole_frames(tokens: int, rows: int, columns: int) -> Grid:
    """(T, H, W) of a run of so many video tokens.

    Raises:
        InputError: they are no whole frames.
    """
    frames, left = divmod(tokens, rows * columns)
    if left or not frames:
        raise InputError(
            f"expected whole frames of {rows} x {columns} = {rows * columns} vision tokens, got {tokens} in one video"
        )
    return frames, rows, columns
