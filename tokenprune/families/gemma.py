"""Gemma 3 and PaliGemma: SigLIP, and vision tokens that see each other in both directions."""

from __future__ import annotations

from math import isqrt
from typing import Any

from tokenprune.families.one_size import OneSize


class Gemma3(OneSize):
    """Gemma 3: patches of a picture are averaged to 256 tokens, whatever its size."""

    family = "gemma3"
    title = "Gemma 3"
    pictures = "a square grid of 16 × 16; windows in most layers, and pictures that see all of themselves"

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        side = isqrt(config.mm_tokens_per_image)
        return side, side


class PaliGemma(OneSize):
    """PaliGemma: the whole prompt is seen from everywhere in it."""

    family = "paligemma"
    title = "PaliGemma"
    pictures = "one square grid; the prompt sees all of itself"
