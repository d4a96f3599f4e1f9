"""What all figures share: colours, and writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

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
        handle, name = tempfile.mkstemp(suffix=".png", prefix=".tokenprune-", dir=target.parent)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "wb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a question may be in any script
            figure.savefig(file, format="png", metadata={"Software": None})
        os.chmod(name, 0o644)  # mkstemp's own mode is for secrets
        os.replace(name, target)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {target}: {error.strerror or error}") from None
        raise
    return target
