"""Kimi K2.5: a tower for pictures of any size, and a decoder with latent attention."""

from __future__ import annotations

from math import prod
from typing import Any

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow


class Kimi(Adapter):
    """Its queries and keys come from narrow states, not from one projection each: no rater attention is read."""

    family = "kimi_k25"
    title = "Kimi K2.5"
    pictures = "rows × columns of any size"
    vision = ("vision_tower", "mm_projector")
    sizes = "image_grid_thw"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if row.pictures is None:
            raise InputError("pictures may have any size: pass image_grid_thw, as the processor gives it")
        down, right = base.config.vision_config.merge_kernel_size
        return tuple((frames, rows // down, columns // right) for frames, rows, columns in row.pictures)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(size) // prod(base.config.vision_config.merge_kernel_size)
