"""Ovis 2: a vision token is a weighted sum of a table of visual words."""

from __future__ import annotations

from typing import Any

from tokenprune.families.one_size import OneSize


class Ovis2(OneSize):
    """The processor cuts a picture into tiles: each is a picture of its own, marked by indicator tokens."""

    family = "ovis2"
    title = "Ovis 2"
    pictures = "a square grid for each tile"
    vision = ("vision_tower",)

    def patch(self, config: Any) -> int:
        return super().patch(config) * int(config.vision_config.hidden_stride)
