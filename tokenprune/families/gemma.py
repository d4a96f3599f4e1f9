"""Gemma 3 and 4, PaliGemma: vision tokens that see each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod
from typing import Any, ClassVar

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionRow
from tokenprune.families.one_size import OneSize


class Gemma3(OneSize):
    """Gemma 3: patches of a picture are averaged to 256 tokens, whatever its size."""

    family = "gemma3"
    title = "Gemma 3"
    pictures = "a square grid of 16 × 16; windows in most layers, and pictures that see all of themselves"

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        side = isqrt(config.mm_tokens_per_image)
        return side, side


class Gemma4(Adapter):
    """Gemma 4: pictures of any size, whose patches are averaged in squares; each layer is given a second embedding of
    each token."""

    family = "gemma4"
    title = "Gemma 4"
    pictures = "rows × columns of any size; windows in most layers, and pictures that see all of themselves"
    vision = ("vision_tower", "embed_vision")
    sizes = "image_position_ids"
    per_token: ClassVar[Mapping[str, int]] = {"per_layer_input": 1}

    def picture_sizes(self, kwargs: Mapping[str, Any]) -> Any:
        """Rows and columns of patches; `image_position_ids` ``[pictures, patches, 2]`` has column and row of each."""
        places = kwargs.get(self.sizes)
        return None if places is None else places.amax(1).flip(-1) + 1

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if row.pictures is None:
            raise InputError("pictures may have any size: pass image_position_ids, as the processor gives them")
        side = self._pooled(base)
        return tuple((1, rows // side, columns // side) for rows, columns in row.pictures)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(size) // self._pooled(base) ** 2

    def _pooled(self, base: Any) -> int:
        return int(base.config.vision_config.pooling_kernel_size)


class PaliGemma(OneSize):
    """PaliGemma: the whole prompt is seen from everywhere in it."""

    family = "paligemma"
    title = "PaliGemma"
    pictures = "one square grid; the prompt sees all of itself"
