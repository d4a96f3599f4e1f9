"""Idefics 2 and 3, SmolVLM: a picture is cut into tiles, each a run of vision tokens between words."""

from __future__ import annotations

from typing import Any

from tokenprune.families.one_size import OneSize
from tokenprune.families.tower import Tower, no_patches


class Idefics3(OneSize):
    """Idefics 3: a pixel shuffle joins patches to a token."""

    family = "idefics3"
    title = "Idefics 3"
    pictures = "a square grid for each tile and for the whole picture, words between them"
    vision = ("vision_model", "connector")
    joins = "scale_factor"


class SmolVLM(Idefics3):
    """SmolVLM, of pictures and of frames of video: each frame is a picture."""

    family = "smolvlm"
    title = "SmolVLM"


class Idefics2(OneSize):
    """Idefics 2: a few learned queries read all patches of a tile, so their tokens lie nowhere in particular."""

    family = "idefics2"
    title = "Idefics 2"
    pictures = "learned queries, 64 for each tile, which lie on no part of it"
    vision = ("vision_model", "connector")

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        return 1, int(config.perceiver_config.resampler_n_latents)

    def tower_parts(self, base: Any) -> Tower:
        raise no_patches(self.title)
