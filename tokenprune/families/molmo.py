"""Molmo 2: an overview and crops of a picture, patches pooled by attention, and a decoder of their own."""

from __future__ import annotations

from typing import Any

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow


class Molmo2(Adapter):
    """Crops of a picture overlap, so its tokens are one grid of their middles, as `image_grids` says."""

    family = "molmo2"
    title = "Molmo 2"
    pictures = "an overview and a grid of all crops, words at the ends of rows; vision tokens see all of themselves"
    sizes = "image_grids"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if row.pictures is None:
            raise InputError("pictures may have any size: pass image_grids, as the processor gives them")
        each = ((picture[:2], picture[2:]) for picture in row.pictures)
        return tuple((1, rows, columns) for grids in each for rows, columns in grids if rows * columns)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        rows, columns, across, down = size
        return rows * columns + across * down
