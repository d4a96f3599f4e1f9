"""What a recipe kept of a video, frame beside frame: the input on top, a line for each stage below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenprune.core.frames import frames_of
from tokenprune.core.place import place_name
from tokenprune.errors import InputError
from tokenprune.plot.kept import ReportLike, draw, legend, rows_of
from tokenprune.plot.style import INK, SOFT_INK, caption, heading, heading_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

ROOM = 1.4
"""Inches to the left of the frames, for names of stages."""


def plot_film(
    frames: Sequence[Image],
    report: ReportLike,
    row: int = 0,
    *,
    title: str | None = None,
    panel: float = 1.5,
    most: int = 8,
) -> Figure:
    """Draw the vision tokens that each stage kept over the frames of a video, in the order of time.

    Args:
        frames: one for each time step of the report (`Clip.steps`), as the model saw them.
        report: report of a run, `tokenprune.attach(...).report`.
        row: which sample of the batch.
        title: text above the frames.
        panel: width of a frame in inches.
        most: frames beside each other; of more time steps than that, an even choice is drawn.

    Raises:
        InputError: no such sample, or frames that do not fit the report.
    """
    from matplotlib.figure import Figure

    if not 0 <= row < len(report.total):
        raise InputError(f"plot: no sample {row} in a report of {len(report.total)}")
    steps = frames_of(report.grids[row], len(frames))
    if len(steps) != len(frames):
        raise InputError(f"plot: got {len(frames)} frames for {len(steps)} time steps")
    shown = [number * len(steps) // most for number in range(most)] if len(steps) > most else [*range(len(steps))]
    lines = 1 + len(report.stages)
    high = panel / float(np.clip(frames[0].width / frames[0].height, 0.25, 4.0))
    wide = max(ROOM + len(shown) * (panel + 0.06) + 0.1, 5.2)
    above, below = heading_height(title, wide), 0.34
    size = (wide, lines * (high + 0.3) + above + below)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    heading(figure, title)
    kept = [rows_of(stage.kept, row) for stage in report.stages]
    merged = [rows_of(stage.merged, row) for stage in report.stages]
    for line in range(lines):
        bottom = below + (lines - 1 - line) * (high + 0.3)
        stage = report.stages[line - 1]
        name = place_name(stage.place, stage.layer) if line else "input"
        count = f"{len(kept[line - 1])} of {report.total[row]}" if line else f"{report.total[row]} tokens"
        middle = (bottom + high / 2) / size[1]
        figure.text(0.012, middle, name, fontsize=9, color=INK, weight="bold", va="bottom")
        figure.text(0.012, middle, count, fontsize=8, color=SOFT_INK, va="top")
        for column, number in enumerate(shown):
            left = ROOM + column * (panel + 0.06)
            axes = figure.add_axes((left / size[0], bottom / size[1], panel / size[0], high / size[1]))
            picture = np.asarray(frames[number].convert("RGB"), dtype=np.float32) / np.float32(255)
            step = steps[number]
            cells = None if not line else step.mask(kept[line - 1])
            draw(axes, picture, step, kept=cells, merged=None if not line else step.mask(merged[line - 1]))
            note = f"step {number + 1}" if cells is None else f"{int(cells.sum())} of {cells.size}"
            caption(axes, "", note)
    legend(figure, size, any(merged))
    return figure
