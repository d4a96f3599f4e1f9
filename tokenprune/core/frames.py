"""Where vision tokens lie on the pictures: one plane for each image, or for each time step of a video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tokenprune.core.grids import ClassToken, Tiles, UnknownGrid
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokenprune.core.grids import Grid


@dataclass(frozen=True)
class Frame:
    """One picture plane of a sample: an image, or one time step of a video."""

    image: int
    """Index of the picture to draw it on."""
    start: int
    """Original index of its first vision token."""
    height: int
    width: int
    name: str = "image 1"
    newline: bool = False
    """A separator token ends each row; it belongs to no part of the picture and is not drawn."""

    @property
    def columns(self) -> int:
        """Tokens per row in the sequence, the separator included."""
        return self.width + self.newline

    def mask(self, indices: Iterable[int]) -> NDArray[np.bool_]:
        """``[height, width]``: True where one of the original `indices` lies; indices of other frames are ignored."""
        cells = np.zeros(self.height * self.columns, dtype=bool)
        inside = [index - self.start for index in indices if 0 <= index - self.start < cells.size]
        cells[inside] = True
        return cells.reshape(self.height, self.columns)[:, : self.width]

    def under(self, box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
        """``[height, width]``: True where a cell overlaps `box`: left, top, right, bottom, as shares of the sides."""
        left, top, right, bottom = box
        y, x = np.arange(self.height), np.arange(self.width)
        rows = (y < bottom * self.height) & (y + 1 > top * self.height)
        return rows[:, None] & ((x < right * self.width) & (x + 1 > left * self.width))


def frames_of(grids: Sequence[Grid], images: int | None = None, asker: str = "plot") -> list[Frame]:
    """The picture planes of a sample, in the order of its vision tokens.

    Args:
        grids: (T, H, W) of each image or video of the sample, in vision tokens.
        images: pictures at hand: one for each grid (a video's time steps share it), or one for each time step. `Tiles`
            show the picture of the grid before them and have none of their own; a class token shows nothing. None: one
            for each time step.
        asker: what needs them; opens the error message.

    Raises:
        InputError: the pictures do not fit the grids, or nothing tells the grids.
    """
    if any(isinstance(grid, UnknownGrid) for grid in grids):
        raise InputError(f"{asker}: where the vision tokens lie on the pictures is not known: the prompt does not tell")
    own = [grid for grid in grids if not isinstance(grid, Tiles | ClassToken)]
    steps = sum(t for t, _, _ in own)
    images = steps if images is None else images
    if images not in (len(own), steps):
        pictures = f"{images} picture{'' if images == 1 else 's'}"
        raise InputError(f"{asker}: got {pictures} for the grids {[*map(tuple, grids)]}")
    tiled = any(isinstance(grid, Tiles) for grid in grids)
    frames: list[Frame] = []
    start, number, shown = 0, -1, -1  # number: of the image or video; shown: picture of the last frame
    for grid in grids:
        t, h, w = grid
        if isinstance(grid, ClassToken):
            start += 1
            continue
        newline = isinstance(grid, Tiles)
        number += not newline
        for step in range(t):
            shown = shown if newline else number if images == len(own) else shown + 1
            name = f"image {number + 1}" if t == 1 else f"video {number + 1}, step {step + 1}"
            name += f", {'tiles' if newline else 'overview'}" if tiled else ""
            frames.append(Frame(shown, start, h, w - newline, name, newline))
            start += h * w
    return frames
