"""Result files of lmms-eval and of `tokenprune eval --json`, found and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.study.paper import lmms, ours
from tokenprune.study.paper.runs import Run


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs in the files, and in the ``.json`` files of the folders below.

    Raises:
        InputError: a path does not exist, a file cannot be read, or nothing holds results.
    """
    runs = []
    for path in paths:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}")
        if path.is_dir():
            found = [run for file in sorted(path.rglob("*.json")) for run in _read(file, named=False)]
            if not found:
                raise InputError(f"{path}: no results in it; expected *_results.json of lmms-eval or eval --json")
            runs += found
        else:
            runs += _read(path, named=True)
    return runs


def _read(file: Path, *, named: bool) -> list[Run]:
    """The runs of a file. Files of folders that were not named themselves may be something else."""
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not named:
            return []
        raise InputError(f"{file}: no JSON: {error}") from None
    for reader in (lmms, ours):
        if isinstance(told, dict) and told.keys() >= reader.KEYS:
            try:
                return reader.runs(file, told)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{file}: not as {reader.NAME} writes it: {type(error).__name__} {error}") from None
    if named:
        raise InputError(f"{file}: neither results of lmms-eval nor of `tokenprune eval --json`")
    return []
