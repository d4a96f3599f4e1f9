"""Boxes as answers: four numbers, and when two boxes count as the same."""

from __future__ import annotations

from tokenprune.scenes.world.grounds import UNITS

BINS = 19
"""Bins a side: a prime, so that no lattice of vision tokens lines up with their borders."""


def bin_of(place: float) -> int:
    """Bin 0 to 18 of a coordinate in scene units."""
    return min(max(int(place * BINS / UNITS), 0), BINS - 1)


def box_answer(box: tuple[float, float, float, float]) -> str:
    """The bins that hold the left, top, right and bottom edge of `box`, as text."""
    return " ".join(str(bin_of(place)) for place in box)


def same_box(given: str, answer: str, iou: float = 0.5) -> bool:
    """Whether two answers overlap enough: intersection over union of their bins, edges included, at least `iou`.

    An answer that is not four numbers, or that ends before it starts, is no box.
    """
    first, second = _read(given), _read(answer)
    if first is None or second is None:
        return False
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    shared = max(width, 0) * max(height, 0)
    return shared >= iou * (_area(first) + _area(second) - shared)


def _read(text: str) -> tuple[int, int, int, int] | None:
    words = text.split()
    if len(words) != 4 or not all(word.isascii() and word.isdigit() for word in words):
        return None
    left, top, right, bottom = (int(word) for word in words)
    return (left, top, right, bottom) if left <= right and top <= bottom else None


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
