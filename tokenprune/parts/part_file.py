"""Parts from one Python file, tried without a package of their own (`--plugin`)."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenprune.errors import InputError
from tokenprune.parts.part import Part


@contextmanager
def parts_of(file: Path) -> Iterator[list[type[Part]]]:
    """The parts that `file` defines; it is a module as long as the block runs, and runs once.

    Raises:
        InputError: no such file, one that fails (its line is told), or one without a part.
    """
    if not file.is_file():
        raise InputError(f"--plugin: no such file: {file}")
    # Not below `tokenprune.`: parts from outside are checked by value, ours by tests.
    name = f"tokenprune_plugin_{file.stem}_{abs(hash(file.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"--plugin: expected a Python file that ends in .py, got {file}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"--plugin: {file}:{_line(error, file)}: {type(error).__name__}: {reason}") from error
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name]
        parts = [c for c in own if issubclass(c, Part) and not inspect.isabstract(c)]
        if not parts:
            raise InputError(f"--plugin: {file} has no part: a class that derives from tp.Scorer, tp.Sampler, …")
        yield parts
    finally:
        sys.modules.pop(name, None)


def _line(error: BaseException, file: Path) -> int:
    """The line of `file` where it failed."""
    if isinstance(error, SyntaxError):
        return error.lineno or 1
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file.resolve()]
    return (frames[-1].lineno or 1) if frames else 1
