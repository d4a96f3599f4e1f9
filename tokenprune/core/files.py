"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends well; else nothing is left of it.

    Raises:
        OSError: the folder does not exist, or cannot be written to.
    """
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=".tokenprune-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)  # mkstemp's own mode is for secrets
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
