"""Aya Vision and Command A Vision: tiles of one size, of which a pixel shuffle joins 2 x 2 patches to a token."""

from __future__ import annotations

from typing import Any

from tokenprune.families.one_size import OneSize


class AyaVision(OneSize):
    """The processor cuts a picture into tiles and adds a thumbnail: each is a picture of its own, marked by text."""

    family = "aya_vision"
    title = "Aya Vision"
    pictures = "a square grid for each tile and the thumbnail, 2 × 2 patches a token; windows in most layers"
    joins = "downsample_factor"

    def turns(self, attention: Any) -> bool:
        return attention.sliding_window is not None


class Cohere2Vision(AyaVision):
    """Command A Vision."""

    family = "cohere2_vision"
    title = "Command A Vision"
