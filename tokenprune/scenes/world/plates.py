"""Code plates: three letters on a light plate, the small text of a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenprune.scenes.world.grounds import UNITS

Box = tuple[float, float, float, float]

GLYPHS: dict[str, tuple[str, ...]] = {
    "c": ("###", "#..", "#..", "#..", "###"),
    "f": ("###", "#..", "##.", "#..", "#.."),
    "h": ("#.#", "#.#", "###", "#.#", "#.#"),
    "j": ("..#", "..#", "..#", "#.#", "###"),
    "l": ("#..", "#..", "#..", "#..", "###"),
    "p": ("###", "#.#", "###", "#..", "#.."),
    "t": ("###", ".#.", ".#.", ".#.", ".#."),
    "u": ("#.#", "#.#", "#.#", "#.#", "###"),
    "x": ("#.#", "#.#", ".#.", "#.#", "#.#"),
    "z": ("###", "..#", ".#.", "#..", "###"),
}
"""Letters, three blocks wide and five high; none of them is a word of the questions."""
LETTERS = tuple(GLYPHS)
CODE_LENGTH = 3

BLOCK = 2.4
"""Side of a glyph's block in scene units: a letter is 7.2 x 12, about as wide as a vision token."""
PADDING = BLOCK
_PITCH = 4 * BLOCK
WIDTH = (4 * CODE_LENGTH - 1) * BLOCK + 2 * PADDING
HEIGHT = 5 * BLOCK + 2 * PADDING
_LIGHT, _DARK = (236.0, 232.0, 218.0), (26.0, 26.0, 34.0)


@dataclass(frozen=True)
class Plate:
    """A plate with a code; `x`, `y` is its centre in scene units."""

    code: tuple[str, ...]
    x: float
    y: float

    @property
    def box(self) -> Box:
        """Left, top, right, bottom in scene units (0 to 96)."""
        return self.x - WIDTH / 2, self.y - HEIGHT / 2, self.x + WIDTH / 2, self.y + HEIGHT / 2

    @property
    def glyph_boxes(self) -> list[Box]:
        """Box of every letter, from left to right."""
        left, top = self.x - WIDTH / 2 + PADDING, self.y - HEIGHT / 2 + PADDING
        starts = [left + number * _PITCH for number in range(len(self.code))]
        return [(start, top, start + 3 * BLOCK, top + 5 * BLOCK) for start in starts]


def make_plate(rng: np.random.Generator) -> Plate:
    """A plate with a random code, equally likely in every third of the picture, across and down."""
    letters = rng.integers(len(LETTERS), size=CODE_LENGTH)
    x, y = _centre(rng, WIDTH / 2), _centre(rng, HEIGHT / 2)
    return Plate(tuple(LETTERS[i] for i in letters), x, y)


def _centre(rng: np.random.Generator, half: float) -> float:
    third = int(rng.integers(3))
    low, high = max(third * UNITS / 3, half + 1), min((third + 1) * UNITS / 3, UNITS - half - 1)
    return float(rng.uniform(low, high))


def covers(box: Box, edges: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How much of each interval between `edges` a box covers, down and across: each `[len(edges) - 1]`, 0 to 1."""
    size = np.diff(edges)

    def share(low: float, high: float) -> NDArray[np.float32]:
        overlap = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
        return np.clip(overlap / size, 0, 1).astype(np.float32)

    return share(box[1], box[3]), share(box[0], box[2])


def paint_plate(canvas: NDArray[np.float32], plate: Plate) -> None:
    """Draw `plate` onto `canvas [side, side, 3]`, antialiased."""
    edges = np.linspace(0, UNITS, len(canvas) + 1, dtype=np.float32)
    rows, columns = covers(plate.box, edges)
    canvas += np.outer(rows, columns)[:, :, None] * (np.array(_LIGHT, np.float32) - canvas)
    ink = np.zeros(canvas.shape[:2], np.float32)
    for letter, (left, top, _, _) in zip(plate.code, plate.glyph_boxes, strict=True):
        for row, line in enumerate(GLYPHS[letter]):
            for column, mark in enumerate(line):
                if mark == "#":
                    x, y = left + column * BLOCK, top + row * BLOCK
                    down, across = covers((x, y, x + BLOCK, y + BLOCK), edges)
                    ink += np.outer(down, across)
    canvas += np.minimum(ink, 1)[:, :, None] * (np.array(_DARK, np.float32) - canvas)


def glyph_places(plate: Plate, grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which letter of the code each cell of a `grid` x `grid` lattice shows, and where the plate is.

    Both are `[grid, grid]`: the letter's number from 1, 0 where there is none and -1 where two share the cell; and 1 on
    the plate, 0 off it, -1 at its edge. The cell under a letter's middle always shows that letter.
    """
    edges = np.linspace(0, UNITS, grid + 1, dtype=np.float32)
    shares = np.stack([np.outer(*covers(box, edges)) for box in plate.glyph_boxes])
    first, second = np.sort(shares, axis=0)[::-1][:2]
    letters = np.where(first >= 0.3, shares.argmax(0) + 1, np.where(first > 0.05, -1, 0))
    letters[(first >= 0.3) & (second > 0.6 * first)] = -1
    for number, (left, top, right, bottom) in enumerate(plate.glyph_boxes, start=1):
        letters[int((top + bottom) / 2 * grid / UNITS), int((left + right) / 2 * grid / UNITS)] = number
    share = np.outer(*covers(plate.box, edges))
    on_plate = np.where(share >= 0.5, 1, np.where(share > 0.1, -1, 0))
    return letters.astype(np.int64), on_plate.astype(np.int64)
