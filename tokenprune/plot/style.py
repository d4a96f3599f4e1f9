"""What figures share: colours, the caption above a panel, and writing a file whole or not at all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.core.files import whole_file
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MERGED = "#16c7e8"
INK = "#1b1f24"
SOFT_INK = "#6a737d"


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
