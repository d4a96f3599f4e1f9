"""What every command needs to speak: consoles, progress, one-line complaints, files written whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokenprune.core.files import whole_file
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A rich console on the stream as it is now."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def table(*headers: str) -> Table:
    """A table without borders; a header that starts with ``>`` is of a column of numbers."""
    from rich.table import Table

    made = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for header in headers:
        number = header.startswith(">")
        made.add_column(header.lstrip(">"), justify="right" if number else "left", overflow="fold", no_wrap=number)
    return made


def _tell(text: Text) -> None:
    """On stderr: wrapped at words where a terminal shows it, one line where a program reads it."""
    screen = console(stderr=True)
    screen.print(text, soft_wrap=not screen.is_terminal)


def complain(message: str) -> None:
    """Tell on stderr what is wrong. Recipe reports bring their own ``file:line:column: error:``."""
    from rich.text import Text

    head = "" if ": error: " in message else "error: "
    _tell(Text.assemble((head, "bold red"), message))


def note(message: str) -> None:
    """Tell on stderr what the user may want to know."""
    from rich.text import Text

    _tell(Text.assemble(("note: ", "yellow"), message))


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A spinner on stderr as long as the block runs; nothing where nobody watches."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield
        return
    with screen.status(f"[dim]{what}"):
        yield


class Count(Protocol):
    """What a progress bar is told."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Things done since the last call, and how many there are, if that has become known."""


@contextmanager
def counter(what: str, total: int | None = None) -> Iterator[Count]:
    """A progress bar on stderr, moved by what the block gets; nothing where nobody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    columns = (TextColumn("[dim]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def count(done: int, total: int | None = None) -> None:
            bar.update(task, advance=done, total=total)

        yield count


def print_json(data: object) -> None:
    """Exactly one JSON document on stdout; lists of numbers stay on one line."""
    import json
    import re

    text = json.dumps(data, indent=2, ensure_ascii=False)
    # A line break cannot stand inside a JSON string, so this never touches one.
    text = re.sub(r"\[\n\s*([-+.\de]+(?:,\n\s*[-+.\de]+)*)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    sys.stdout.write(text + "\n")


def check_folder(path: Path, option: str) -> None:
    """Raise `InputError` unless a file can be written at `path`: before a long run, not after it."""
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; expected a file name")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{option}: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option}: no permission to write to {folder}")


def check_plot(path: Path | None) -> None:
    """Raise `InputError` unless --save-plot is left out, or a PNG can be written there."""
    if path is None:
        return
    check_folder(path, "--save-plot")
    if path.suffix.lower() != ".png":
        raise InputError(f"--save-plot: expected a name that ends in .png, got {path.name}")


def write_text(path: Path, text: str, option: str) -> None:
    """Write `text` to `path`, whole or not at all.

    Raises:
        InputError: the folder is missing or cannot be written to.
    """
    check_folder(path, option)
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(f"{option}: cannot write {path}: {error.strerror or error}") from None
