"""Video files for tests, written by PyAV: grey frames, each brighter than the last, with a mark at the top left."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 8
"""By which a frame is brighter than the one before."""


def write_clip(
    path: Path,
    frames: int = 20,
    size: tuple[int, int] = (64, 48),
    fps: int = 10,
    codec: str = "mpeg4",
    aspect: int = 1,
    title: str = "",
) -> Path:
    """A clip of so many frames, `size` wide and high; `aspect` is how many times as wide as high a pixel is."""
    width, height = size
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if aspect != 1:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect, 1)
        for number in range(frames):
            pixels = np.full((height, width, 3), STEP * number, np.uint8)
            pixels[: height // 4, : width // 4] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
