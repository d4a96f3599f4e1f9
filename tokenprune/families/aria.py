"""Aria: learned queries read the patches of a picture, and a decoder of experts reads them."""

from __future__ import annotations

from typing import Any

from tokenprune.families.one_size import OneSize
from tokenprune.families.tower import Tower, no_patches


class Aria(OneSize):
    """As many queries as the configuration has for that number of patches; they lie on no part of the picture."""

    family = "aria"
    title = "Aria"
    pictures = "learned queries, 128 or 256 for each picture, which lie on no part of it"

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().rectangle(config, height, width)
        return 1, int(config.projector_patch_to_query_dict.get(rows * columns, 0))

    def tower_parts(self, base: Any) -> Tower:
        raise no_patches(self.title)
