"""LLaVA-OneVision: a SigLIP tower, the tiles of LLaVA-NeXT, Qwen 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.core.grids import ClassToken, Grid
from tokenprune.cost.shape import VisionShape
from tokenprune.errors import InputError
from tokenprune.families.llava import LlavaNext
from tokenprune.families.video import whole_frames


class LlavaOnevision(LlavaNext):
    """Its pictures are laid out as LLaVA-NeXT's, though many tiles are interpolated to fewer tokens."""

    family = "llava_onevision"
    title = "LLaVA-OneVision"
    pictures = "as LLaVA-NeXT, many tiles interpolated to fewer tokens; a video is a grid of frames and a newline token"

    def video_grids(self, base: Any, newline: Sequence[bool]) -> list[Grid]:
        vision = base.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)  # half of the patches along a side, rounded up
        ends = [at for at, ends in enumerate(newline) if ends]
        if not ends or ends[-1] != len(newline) - 1:
            raise InputError(f"expected a video that ends in image_newline, got {len(newline)} vision tokens")
        grids: list[Grid] = []
        for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            grids += [whole_frames(end - start, side, side), ClassToken()]
        return grids

    def packed(self, base: Any, tiles: Sequence[Tensor], sizes: Any, newline: Tensor) -> Any:
        return base.pack_image_features(tiles, sizes, newline, base.config.vision_aspect_ratio)[0]

    def vision_shape(self, config: Any) -> VisionShape:
        self.refuse("ledger: no shape known for", "vision_shape")  # LLaVA-NeXT's is of CLIP
