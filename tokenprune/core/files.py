"""Files that survive a kill: written whole or not at all, or line by line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends well; else `path` stays as it was.

    A process that is killed meanwhile leaves a hidden file beside it, never a part of `path`.

    Raises:
        OSError: the folder does not exist, or cannot be written to.
    """
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=".tokenprune-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)  # some disks tell only now that they are full
        os.chmod(name, 0o644)  # mkstemp's own mode is for secrets
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """Whether nobody else is within such a block for `folder`, which exists; False is told at once.

    The system gives the folder back when a process ends, however it ends: nothing lies about after a kill. Where it
    cannot lock folders (Windows, some network disks) everybody is told True.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free
    finally:
        os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Write a line behind the others; it is on disk when this returns. `whole_lines` reads them.

    Raises:
        OSError: it cannot be written; a part of it may be there.
    """
    with path.open("ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that `append_line` wrote, but for a last one that breaks off; none without a file.

    Raises:
        OSError: it cannot be read.
    """
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def cut_broken_line(path: Path) -> None:
    """Cut off the last line where it breaks off, as a killed process leaves it: the next one begins a line.

    Raises:
        OSError: it cannot be read, or not be cut.
    """
    data = path.read_bytes() if path.exists() else b""
    if not data.endswith(b"\n") and data:
        os.truncate(path, data.rfind(b"\n") + 1)
