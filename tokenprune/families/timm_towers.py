"""FastVLM and Perception-LM: towers of timm, which show no blocks; one size of pictures or tiles, Qwen 2 and Llama."""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

from tokenprune.errors import InputError
from tokenprune.families.one_size import OneSize


class FastVlm(OneSize):
    """FastVLM: FastViT, which reads the picture with convolutions and ends in a map of few features."""

    family = "fast_vlm"
    title = "FastVLM"
    pictures = "one square grid, 16 × 16 of a picture of 1024 pixels"

    def usual(self, config: Any) -> tuple[int, int]:
        side = isqrt(config.image_seq_length)
        return side, side

    def rectangle(self, config: Any, height: int, width: int) -> tuple[int, int]:
        """As the configuration says, whatever the pixels: how many of them make a token it does not say."""
        return self.usual(config)


class PerceptionLM(OneSize):
    """Perception-LM: Perception Encoder, whose tokens are averaged in squares; each tile is a picture."""

    family = "perception_lm"
    title = "Perception-LM"
    pictures = "a square grid for each tile and the thumbnail"

    def usual(self, config: Any) -> tuple[int, int]:
        height, width = config.vision_config.model_args["img_size"]
        return int(height), int(width)

    def patch(self, config: Any) -> int:
        """As the name of timm's architecture says: ``vit_pe_core_large_patch14_336``."""
        architecture = str(getattr(config.vision_config, "architecture", ""))
        found = re.search(r"patch(\d+)", architecture)
        if found is None:
            raise InputError(f"the architecture {architecture!r} of the tower does not tell the size of its patches")
        return int(found[1]) * int(config.projector_pooling_ratio)
