"""InternVL 3 and 3.5: tiles of one size, of which a pixel shuffle joins 2 x 2 patches to a vision token."""

from __future__ import annotations

from typing import Any

from tokenprune.families.one_size import OneSize


class InternVL(OneSize):
    """The processor cuts a picture into tiles and adds a thumbnail: each is a picture of its own, marked by text."""

    family = "internvl"
    title = "InternVL 3, 3.5"
    pictures = "a square grid for each tile and the thumbnail, 2 × 2 patches a token"

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        side = self.patch(config) / config.downsample_ratio
        return int(height / side), int(width / side)
