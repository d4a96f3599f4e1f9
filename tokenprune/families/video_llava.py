"""Video-LLaVA: LLaVA-1.5 with one tower for images and one for video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenprune.core.grids import ClassToken, Grid
from tokenprune.families.adapter import VisionRow
from tokenprune.families.one_size import OneSize
from tokenprune.families.video import whole_frames


class VideoLlava(OneSize):
    """Images have one size. A frame of video brings the tower's class token too, which is a grid of its own."""

    family = "video_llava"
    title = "Video-LLaVA"
    pictures = "one square grid; for each frame of a video, a class token before it"
    vision = ("image_tower", "video_tower", "multi_modal_projector")

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        rows, columns = self.rectangle(base.config, *self.usual(base.config))
        grids: list[Grid] = []
        for start, end, video in row.spans():
            if video:
                frames, _, _ = whole_frames(end - start, 1, rows * columns + 1)
                grids += [ClassToken(), (1, rows, columns)] * frames
            else:
                grids += super().grids(base, replace(row, runs=(end - start,), videos=()))
        return tuple(grids)
