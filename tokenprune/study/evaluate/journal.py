"""Results on disk, one line a batch, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenprune.core.files import append_line, cut_broken_line, whole_lines
from tokenprune.errors import InputError

NAME = "results.jsonl"


@dataclass(frozen=True)
class Batch:
    """What one condition did with one batch: an entry of each list for each case."""

    answers: list[str]
    total: list[int]
    """Vision tokens of the picture."""
    average: list[float]
    """Vision tokens that entered a decoder layer, mean over all layers."""
    final: list[float]
    """Vision tokens in the last layer."""
    flops: list[int]
    """Multiply-adds of the prefill, from pixels to the first token."""
    seconds: float
    """Time of the method (all its stages) for the whole batch."""


class Journal:
    """All batches that are done, in a file or, without a folder, in memory only.

    Args:
        folder: where `results.jsonl` is kept; made when missing. A line that breaks off, as a killed run leaves one,
            is dropped; that batch runs again.

    Raises:
        InputError: the folder cannot be used, or a line of the file is not a result.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._done: dict[str, Batch] = {}
        self._path = None if folder is None else folder / NAME
        if folder is None or self._path is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._read(self._path)
            with self._path.open("ab"):
                pass
        except OSError as error:
            raise InputError(f"--output: cannot use {folder}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self._done)

    def get(self, key: str) -> Batch | None:
        """The batch of that key, if it was done."""
        return self._done.get(key)

    def add(self, key: str, label: str, batch: Batch) -> None:
        """Remember a batch; with a folder it is on disk when this returns.

        Raises:
            InputError: it cannot be written, such as to a full disk; what was done before is kept.
        """
        if self._path is not None:
            try:
                append_line(self._path, json.dumps({"key": key, "condition": label, **asdict(batch)}))
            except OSError as error:
                raise InputError(f"--output: cannot write {self._path}: {error.strerror or error}") from None
        self._done[key] = batch

    def _read(self, path: Path) -> None:
        for number, line in enumerate(whole_lines(path), start=1):
            try:
                fields = json.loads(line)
                key, _ = fields.pop("key"), fields.pop("condition")
                self._done[key] = Batch(**fields)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{path}:{number}: error: not a result of `tokenprune eval`; move the file") from None
        cut_broken_line(path)
