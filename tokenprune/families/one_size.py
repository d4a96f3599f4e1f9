"""`OneSize`: families whose pictures, or the tiles of a picture, all have the same rectangle of vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow


class OneSize(Adapter):
    """Pictures of one size: that of the pixels at hand, else the one that the tower was made for.

    A processor that cuts a picture into tiles gives each tile as a picture of its own.
    """

    joins: ClassVar[str | None] = None
    """What the configuration calls the number of patches along a side of a vision token; None: one patch each."""

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of vision tokens of a picture of so many pixels."""
        side = self.patch(config) * (1 if self.joins is None else int(getattr(config, self.joins)))
        return height // side, width // side

    def patch(self, config: Any) -> int:
        """Pixels along a side of a patch."""
        return _sides(config.vision_config.patch_size)[0]

    def usual(self, config: Any) -> tuple[int, int]:
        """Height and width of the pictures that the tower was made for."""
        return _sides(config.vision_config.image_size)

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        rows, columns = self.rectangle(base.config, *(row.pixels or self.usual(base.config)))
        whole, n = rows * columns, sum(row.runs)
        if not whole or n % whole:
            raise InputError(
                f"expected whole pictures of {rows} x {columns} = {whole} vision tokens, got {n} in one sample: half a "
                "picture, or pictures of several sizes?"
            )
        return ((1, rows, columns),) * (n // whole)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, which configurations give as one number or as two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
