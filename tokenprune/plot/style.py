"""What all figures share: colours, and writing a file whole or not at all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.core.files import whole_file
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MERGED = "#16c7e8"
INK = "#1b1f24"
SOFT_INK = "#6a737d"


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
