"""LLaVA-NeXT-Video: pictures as LLaVA-NeXT, frames of video pooled."""

from __future__ import annotations

from typing import Any

from tokenprune.cost.shape import VisionShape
from tokenprune.families.llava import LlavaNext


class LlavaNextVideo(LlavaNext):
    """Its pictures are LLaVA-NeXT's: an overview, then tiles whose rows end in a newline token."""

    family = "llava_next_video"
    title = "LLaVA-NeXT-Video"
    pictures = "as LLaVA-NeXT; frames of video are pooled"
    vision = ("vision_tower", "multi_modal_projector", "vision_resampler")

    def vision_shape(self, config: Any) -> VisionShape:
        self.refuse("ledger: no shape known for", "vision_shape")  # LLaVA-NeXT's does not know pooled frames
