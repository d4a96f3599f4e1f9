"""LLaVA-NeXT-Video: pictures as LLaVA-NeXT, frames of video pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.core.grids import Grid
from tokenprune.cost.shape import VisionShape
from tokenprune.families.llava import LlavaNext
from tokenprune.families.video import whole_frames


class LlavaNextVideo(LlavaNext):
    """Its pictures are LLaVA-NeXT's: an overview, then tiles whose rows end in a newline token."""

    family = "llava_next_video"
    title = "LLaVA-NeXT-Video"
    pictures = "as LLaVA-NeXT; a video is a grid of frames, each pooled to a square"
    vision = ("vision_tower", "multi_modal_projector", "vision_resampler")

    def video_grids(self, base: Any, newline: Sequence[bool]) -> list[Grid]:
        vision = base.config.vision_config
        side = vision.image_size // vision.patch_size // base.config.spatial_pool_stride
        return [whole_frames(len(newline), side, side)]

    def vision_shape(self, config: Any) -> VisionShape:
        self.refuse("ledger: no shape known for", "vision_shape")  # LLaVA-NeXT's does not know pooled frames
