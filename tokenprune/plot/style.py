"""What figures share: one palette, the look of axes, headings and captions, and writing a file whole or not at all.

Colours are told apart also by people who lack one kind of cones (`tests/test_figures.py` asks a model of their eyes):
those of Okabe and Ito ("Color Universal Design", 2008) and of Tol, darkened where white paper would swallow them. Lines
have marks of their own beside.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.core.files import whole_file
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
SOFT_INK = "#57606a"
GRID = "#e4e7ea"
BLUE, VERMILION, SKY = "#0072b2", "#d55e00", "#56b4e9"
COLOURS = (BLUE, VERMILION, "#00916a", "#cc6fa3", "#332288", SKY, "#882255", "#7a5c00")
"""Of lines and points, in this order."""
GREYS = ("#4a525a", "#6f7881", "#8b949d", "#a3abb3")
"""Of baselines."""
MARKS = "osD^vPX*"
METHOD = VERMILION
"""What the recipe itself costs, in time and in multiply-adds."""
MERGED = "#16c7e8"
"""Anchors of merged tokens on pictures."""


def look(axes: Axes, *, grid: Literal["x", "y"] | None = None) -> None:
    """Give axes the common look: soft ticks, no frame above and at the right, and a pale grid along one axis."""
    axes.tick_params(colors=SOFT_INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREYS[2])
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Name the axes."""
    axes.set_xlabel(x, color=SOFT_INK, fontsize=8.5)
    axes.set_ylabel(y, color=SOFT_INK, fontsize=8.5)


def titled(title: str | None, width: float, height: float) -> Figure:
    """A figure with `title` over it; its panels lay themselves out in the `height` inches below."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    above = heading_height(title, width)
    rest = ConstrainedLayoutEngine(rect=(0, 0, 1, height / (height + above)))
    figure = Figure(figsize=(width, height + above), dpi=150, layout=rest, facecolor="white")
    heading(figure, title)
    return figure


def heading(figure: Figure, title: str | None, *, lines: int = 4, left: float = 0.012) -> float:
    """Write `title` over a figure, wrapped to its width, and return the inches that it takes: 0 without one.

    Args:
        figure: of its final width; the caller makes room above its panels.
        title: words of any length, line breaks and dollar signs included.
        lines: at most; what is longer ends in an ellipsis.
        left: of the words, as a share of the width.
    """
    wrapped = wrap(title, figure.get_figwidth(), lines)
    if not wrapped:
        return 0.0
    style: dict[str, Any] = {"fontsize": 10, "color": INK, "weight": "bold", "linespacing": 1.25}
    at = 1 - 0.12 / figure.get_figheight()
    figure.text(left, at, "\n".join(wrapped), ha="left", va="top", parse_math=False, **style)
    return heading_height(title, figure.get_figwidth(), lines)


def heading_height(title: str | None, width: float, lines: int = 4) -> float:
    """Inches that `heading` takes over a figure of this width."""
    count = len(wrap(title, width, lines))
    return 0.22 + 0.18 * count if count else 0.0


def wrap(title: str | None, width: float, lines: int = 4) -> list[str]:
    """Lines of a heading over `width` inches."""
    room = max(12, int((width - 0.2) * 11.5))  # characters of this size to the inch
    return textwrap.wrap(title or "", room, max_lines=lines, placeholder=" …")


def caption(axes: Axes, head: str, line: str) -> None:
    """Write two lines above a panel: `head` in bold, `line` smaller below it."""
    where: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate(head, xytext=(0, 14), fontsize=9, color=INK, weight="bold", **where)
    axes.annotate(line, xytext=(0, 4), fontsize=8, color=SOFT_INK, **where)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write `figure` as a PNG: the same bytes every time, and never half a file.

    Raises:
        InputError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    try:
        with whole_file(target) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a question may be in any script
            figure.savefig(file, format="png", metadata={"Software": None})
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    return target
