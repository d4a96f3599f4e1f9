"""Pictures of what a recipe kept: one panel for the input and one for each stage, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tokenprune.core.frames import Frame, frames_of
from tokenprune.core.place import place_name
from tokenprune.errors import InputError
from tokenprune.plot.style import INK, MERGED, SOFT_INK, caption, heading, heading_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from tokenprune.core.grids import Grid


WIDE = 2.0
"""Width over height of a picture from which it counts as wide."""
LETTER = 0.068
"""Inches of a letter of a panel's caption: panels of tall pictures are as wide as what stands above them."""


class StageLike(Protocol):
    """What a picture needs of one stage of a report."""

    @property
    def place(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def kept(self) -> Tensor: ...
    @property
    def merged(self) -> Tensor: ...


class ReportLike(Protocol):
    """What a picture needs of a report; `tokenprune.core.report.Report` has it all."""

    @property
    def stages(self) -> Sequence[StageLike]: ...
    @property
    def grids(self) -> Sequence[Sequence[Grid]]: ...
    @property
    def total(self) -> Sequence[int]: ...


def plot_kept(
    images: Image | Sequence[Image],
    report: ReportLike,
    row: int = 0,
    *,
    title: str | None = None,
    panel: float = 2.9,
    most: int = 12,
) -> Figure:
    """Draw the vision tokens that each stage kept over the pictures they came from.

    Dropped cells fade, kept cells stay clear inside a thin outline, and a dot marks the anchor of a merged token.

    Args:
        images: the picture or pictures of one sample, as the model saw them (cropped, where the processor crops).
        report: report of a run, `tokenprune.attach(...).report`.
        row: which sample of the batch.
        title: text above the panels, wrapped to their width.
        panel: height of a panel in inches; those of one wide picture (`WIDE`) stand below each other, and are lower.
        most: lines of panels; of more images or time steps than that, an even choice is drawn.

    Raises:
        InputError: no such sample, or pictures that do not fit the report.
    """
    from matplotlib.figure import Figure

    pictures = list(images) if isinstance(images, Sequence) else [images]
    if not 0 <= row < len(report.total):
        raise InputError(f"plot: no sample {row} in a report of {len(report.total)}")
    frames = frames_of(report.grids[row], len(pictures))
    if len(frames) > most:
        frames = [frames[number * len(frames) // most] for number in range(most)]
    notes = [_count(rows_of(stage.kept, row), rows_of(stage.merged, row), report.total[row]) for stage in report.stages]
    aspect = float(np.median([pictures[frame.image].width / pictures[frame.image].height for frame in frames]))
    stacked = len(frames) == 1 and aspect > WIDE  # beside each other they would be too small to see anything on
    high = panel * WIDE / aspect if stacked else panel
    wide = max(panel * float(np.clip(aspect, 0.5, WIDE)), LETTER * max(map(len, notes), default=0))
    panels = 1 + len(report.stages)
    lines, columns = (panels, 1) if stacked else (len(frames), panels)
    width, bottom = columns * (wide + 0.12), 0.34
    top = heading_height(title, width)
    size = (width, lines * (high + 0.42) + top + bottom)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    axes = figure.subplots(lines, columns, squeeze=False).reshape(len(frames), panels)
    figure.subplots_adjust(
        left=0.012, right=0.988, bottom=bottom / size[1], top=1 - (top + 0.4) / size[1], wspace=0.05, hspace=0.46 / high
    )
    several = len(frames) > 1
    for line, frame in enumerate(frames):
        picture = np.asarray(pictures[frame.image].convert("RGB"), dtype=np.float32) / np.float32(255)
        draw(axes[line, 0], picture, frame, kept=None, merged=None)
        note = [f"{report.total[row]} vision tokens"] if line == 0 else []
        caption(axes[line, 0], "" if line else "input", " · ".join(note + [frame.name] * several))
        for column, stage in enumerate(report.stages, start=1):
            kept, merged = rows_of(stage.kept, row), rows_of(stage.merged, row)
            cells = frame.mask(kept)
            draw(axes[line, column], picture, frame, kept=cells, merged=frame.mask(merged))
            note = [notes[column - 1]] if line == 0 else []
            note += [f"{cells.sum()} of {cells.size} here"] * several
            caption(axes[line, column], "" if line else place_name(stage.place, stage.layer), " · ".join(note))
    if stacked or wide > panel * aspect:
        for each in axes.flat:  # below its caption, where the panel is wider than the picture
            each.set_anchor("NW")
    heading(figure, title)
    legend(figure, size, any(rows_of(stage.merged, row) for stage in report.stages))
    return figure


def rows_of(tensor: Tensor, row: int) -> list[int]:
    """Original indices of one sample: a row of the report's tensor without its padding."""
    return [int(index) for index in tensor[row].tolist() if index >= 0]


def _count(kept: list[int], merged: list[int], total: int) -> str:
    return f"kept {len(kept)} of {total}" + (f" + {len(merged)} merged" if merged else "")


def draw(
    axes: Axes,
    picture: NDArray[np.float32],
    frame: Frame,
    *,
    kept: NDArray[np.bool_] | None,
    merged: NDArray[np.bool_] | None,
) -> None:
    """One panel, in cells: x from 0 to the grid's width, y downwards to its height.

    Args:
        axes: where to draw.
        picture: ``[H, W, 3]`` in 0 … 1.
        frame: the cells that lie on it.
        kept: of the frame's shape; None draws the picture with its grid.
        merged: cells of merged tokens' anchors.
    """
    axes.set_axis_off()
    height, width = frame.height, frame.width
    shape = picture.shape[0] / picture.shape[1]
    extent = (0.0, float(width), float(height), 0.0)
    look = {"extent": extent, "aspect": shape * width / height, "interpolation": "antialiased"}
    axes.imshow(picture if kept is None else _fade(picture, kept), **look)
    if kept is None:
        if max(height, width) <= 48:  # finer grids would hide the picture
            axes.vlines(range(1, width), 0, height, colors="white", linewidth=0.35, alpha=0.55)
            axes.hlines(range(1, height), 0, width, colors="white", linewidth=0.35, alpha=0.55)
        return
    _outline(axes, kept)
    if merged is not None and merged.any():
        y, x = np.nonzero(merged)
        side = 72 * axes.get_window_extent().height / axes.figure.dpi / height  # a cell, in points
        dot = float(np.clip(side * 0.5, 1.2, 8)) ** 2
        axes.scatter(x + 0.5, y + 0.5, s=dot, c=MERGED, edgecolors=INK, linewidths=0.5, zorder=3)


def _fade(picture: NDArray[np.float32], kept: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The picture with the pixels of all cells that are not kept turned grey and pale."""
    height, width = picture.shape[:2]
    y = np.minimum(np.arange(height) * kept.shape[0] // height, kept.shape[0] - 1)
    x = np.minimum(np.arange(width) * kept.shape[1] // width, kept.shape[1] - 1)
    clear = kept[y[:, None], x[None, :]][..., None]
    grey = picture @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    pale = 0.66 + 0.12 * grey[..., None] + 0.11 * picture
    return np.where(clear, picture, pale).astype(np.float32)


def _outline(axes: Axes, kept: NDArray[np.bool_]) -> None:
    """A thin line where a kept cell meets a dropped one or the border: neighbours share one outline."""
    from matplotlib.collections import LineCollection

    framed = np.pad(kept, 1)
    segments = [((x, y), (x, y + 1)) for y, x in zip(*np.nonzero(framed[1:-1, 1:] != framed[1:-1, :-1]), strict=True)]
    segments += [((x, y), (x + 1, y)) for y, x in zip(*np.nonzero(framed[1:, 1:-1] != framed[:-1, 1:-1]), strict=True)]
    axes.add_collection(
        LineCollection(segments, colors=INK, linewidths=0.9, capstyle="projecting", clip_on=False, zorder=2),
        autolim=False,
    )


def legend(figure: Figure, size: tuple[float, float], merged: bool) -> None:
    """Explain outline, fading and, where tokens were `merged`, dots; below the panels of a figure of this `size`."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor="white", edgecolor=INK, linewidth=0.9, label="kept"),
        Patch(facecolor="#d2d5d9", edgecolor="none", label="dropped"),
    ]
    if merged:
        dot = Line2D([], [], linestyle="none", marker="o", markersize=5, color=MERGED, markeredgecolor=INK)
        dot.set(markeredgewidth=0.5, label="anchor of a merged token")
        handles.append(dot)
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.006, 0.02 / size[1]),
        ncols=len(handles),
        fontsize=7.5,
        frameon=False,
        labelcolor=SOFT_INK,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.3,
    )
