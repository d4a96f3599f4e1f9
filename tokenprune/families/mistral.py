"""Mistral 3 with its Pixtral tower: pictures of any size, a token for 2 x 2 patches, words at the ends of rows."""

from __future__ import annotations

from math import prod
from typing import Any

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow


class Mistral3(Adapter):
    """The text between rows does not tell where a picture ends: `image_sizes` does."""

    family = "mistral3"
    title = "Mistral 3"
    pictures = "rows × columns of any size, a word at the end of each row"
    sizes = "image_sizes"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if row.pictures is None:
            raise InputError("pictures may have any size: pass image_sizes, as the processor gives them")
        return tuple((1, *self._sides(base, size)) for size in row.pictures)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(self._sides(base, size))

    def _sides(self, base: Any, size: tuple[int, ...]) -> tuple[int, int]:
        side = int(base.config.vision_config.patch_size * base.config.spatial_merge_size)
        return size[0] // side, size[1] // side


class LightOnOcr(Mistral3):
    """LightOnOCR: the same tower, Qwen 3."""

    family = "lighton_ocr"
    title = "LightOnOCR"
    vision = ("vision_encoder", "vision_projection")
