"""Which vision tokens show the same place at different times: plain arithmetic on the grids of a sample.

Pictures of one size that follow each other count as frames of one video, whether they came as one grid (T, H, W) or one
by one: Qwen3-VL puts words between the frames of a video, so that each is a grid of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenprune.core.grids import Grid, Tiles


class Video(NamedTuple):
    """Frames of one size; a single picture is a video of one frame."""

    frames: int
    rows: int
    columns: int


def videos(grids: Sequence[Grid]) -> list[Video]:
    """The videos of a sample, in order. Tiles (LLaVA-NeXT) are a picture of their own."""
    found: list[Video] = []
    joinable = False
    for grid in grids:
        tiles = isinstance(grid, Tiles)
        if found and joinable and not tiles and found[-1][1:] == tuple(grid[1:]):
            found[-1] = found[-1]._replace(frames=found[-1].frames + grid[0])
        else:
            found.append(Video(*grid))
        joinable = not tiles
    return found


def frame_numbers(grids: Sequence[Grid]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each original token, a number of its place (video, row and column), and of its frame within the video."""
    place: list[int] = []
    frame: list[int] = []
    start = 0
    for video in videos(grids):
        cells = video.rows * video.columns
        place += list(range(start, start + cells)) * video.frames
        frame += np.repeat(np.arange(video.frames), cells).tolist()
        start += cells
    return tuple(place), tuple(frame)


def earlier_tokens(grids: Sequence[Grid], run: int | None = None) -> tuple[int, ...]:
    """For each original token, the one at the same place in the frame that it is compared with; -1 without one.

    Args:
        grids: (T, H, W) of each image or video.
        run: None compares each frame with the one before. A number cuts the video into runs of so many frames, whose
            first is compared with none, and compares by halving steps: of four, 1 with 0, 2 with 0 and 3 with 2.
    """
    index: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    start = 0
    for video in videos(grids):
        cells = video.rows * video.columns
        for frame in range(video.frames):
            at = frame if run is None else frame % run
            back = (1 if run is None else at & -at) if at else 0
            own = np.arange(start, start + cells)
            index.append(own - back * cells if back else np.full(cells, -1))
            start += cells
    return tuple(np.concatenate(index).tolist())
