"""Video-LLaVA: LLaVA-1.5 with one tower for images and one for video."""

from __future__ import annotations

from tokenprune.families.one_size import OneSize


class VideoLlava(OneSize):
    """Images have one size. A frame of video brings its class token too, which no grid here tells."""

    family = "video_llava"
    title = "Video-LLaVA"
    pictures = "one square grid"
    vision = ("image_tower", "video_tower", "multi_modal_projector")
