"""LFM2-VL: SigLIP 2 for pictures of any size, and a decoder of short convolutions and a few full layers."""

from __future__ import annotations

from math import prod
from typing import Any

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow


class Lfm2VL(Adapter):
    """A large picture is cut into tiles, each of which counts as a picture. Convolutions read the survivors alone."""

    family = "lfm2_vl"
    title = "LFM2-VL"
    pictures = "rows × columns of any size, 2 × 2 patches a token; most decoder layers are convolutions"
    sizes = "spatial_shapes"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if row.pictures is None:
            raise InputError("pictures may have any size: pass spatial_shapes, as the processor gives them")
        factor = int(base.config.downsample_factor)
        return tuple((1, rows // factor, columns // factor) for rows, columns in row.pictures)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(size) // int(base.config.downsample_factor) ** 2
