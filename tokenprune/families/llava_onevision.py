"""LLaVA-OneVision: a SigLIP tower, the tiles of LLaVA-NeXT, Qwen 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.cost.shape import VisionShape
from tokenprune.families.llava import LlavaNext


class LlavaOnevision(LlavaNext):
    """Its pictures are laid out as LLaVA-NeXT's, though many tiles are interpolated to fewer tokens."""

    family = "llava_onevision"
    title = "LLaVA-OneVision"
    pictures = "as LLaVA-NeXT, many tiles interpolated to fewer tokens"

    def packed(self, base: Any, tiles: Sequence[Tensor], sizes: Any, newline: Tensor) -> Any:
        return base.pack_image_features(tiles, sizes, newline, base.config.vision_aspect_ratio)[0]

    def vision_shape(self, config: Any) -> VisionShape:
        self.refuse("ledger: no shape known for", "vision_shape")  # LLaVA-NeXT's is of CLIP
