"""MiniCPM-V 4.6: pictures of any size, whose patches are joined twice, 2 x 2 each time, and Qwen3.5."""

from __future__ import annotations

from math import prod
from typing import Any

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow


class MiniCPMV(Adapter):
    """A large picture is cut into slices, each of which counts as a picture."""

    family = "minicpmv4_6"
    title = "MiniCPM-V 4.6"
    pictures = "rows × columns of any size, 4 × 4 patches a token; three decoder layers of four are recurrent"
    vision = ("vision_tower", "merger")
    sizes = "target_sizes"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if row.pictures is None:
            raise InputError("pictures may have any size: pass target_sizes, as the processor gives them")
        side = self._side(base.config)
        return tuple((1, rows // side, columns // side) for rows, columns in row.pictures)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(size) // self._side(base.config) ** 2

    def _side(self, config: Any) -> int:
        """Patches along a side of a token; the tower itself joins 2 x 2 of them, unless told not to."""
        inside = 1 if config.downsample_mode == "4x" else 2
        return inside * int(config.merge_kernel_size[0]) ** int(config.merger_times)
