"""Rows and columns of pictures that have a given number of vision tokens."""

from __future__ import annotations

import math


def exact_sides(tokens: int) -> tuple[int, int]:
    """Rows and columns of the rectangle of exactly `tokens` that is nearest to a square, never higher than wide."""
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return rows, tokens // rows


def largest_sides(tokens: int) -> tuple[int, int]:
    """Rows and columns of the largest rectangle of at most `tokens` that is not more than twice as wide as high."""
    return max(
        ((rows, min(2 * rows, tokens // rows)) for rows in range(1, math.isqrt(tokens) + 1)),
        key=lambda sides: (sides[0] * sides[1], sides[0]),
    )
