"""`AnswersFile`: answers on disk, one line each, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.core.files import append_line, cut_broken_line, whole_file, whole_lines
from tokenprune.errors import InputError
from tokenprune.study.many.batches import Line


class AnswersFile:
    """The answers to `lines` under one model and recipe, in a ``.jsonl`` file.

    Answers are appended as they come, each batch on disk when `add` returns. `finish` puts them into the order of the
    questions, so the file ends with the same bytes however often the run was killed and however many processes took
    part.

    Args:
        path: of the file; made when missing.
        lines: the questions, in the order of the finished file.
        run: key of all that answers depend on beside picture and question: model, recipe, length. Answers of another
            run are refused, never mixed.

    Raises:
        InputError: the file cannot be used, or holds something other than answers of this run to these questions.
    """

    def __init__(self, path: Path, lines: Sequence[Line], run: str) -> None:
        self.path, self.run = path, run
        self._lines = {line.key: line for line in lines}
        self.answers: dict[str, dict[str, Any]] = {}
        """What is done, by the key of its line."""
        try:
            self._read()
            cut_broken_line(path)
        except OSError as error:
            raise self._unusable(error) from None

    def __contains__(self, line: Line) -> bool:
        return line.key in self.answers

    def add(self, answers: Sequence[tuple[Line, Mapping[str, Any]]]) -> None:
        """Append answers that are not there yet.

        Raises:
            InputError: the file cannot be written, such as to a full disk; what was done before is kept.
        """
        made = {line.key: self._entry(line, told) for line, told in answers if line.key not in self.answers}
        if not made:
            return
        try:
            append_line(self.path, "\n".join(map(_dumped, made.values())))
        except OSError as error:
            raise self._unusable(error) from None
        self.answers |= made

    def finish(self) -> None:
        """Put the answers into the order of the questions; the file changes whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        told = "".join(f"{_dumped(self.answers[key])}\n" for key in self._lines if key in self.answers).encode()
        try:
            if not self.path.exists() or self.path.read_bytes() != told:
                with whole_file(self.path) as file:
                    file.write(told)
        except OSError as error:
            raise self._unusable(error) from None

    def _entry(self, line: Line, told: Mapping[str, Any]) -> dict[str, Any]:
        given = {"given": dict(line.given)} if line.given else {}
        return {"image": line.image, "question": line.question, **told, **given, "run": self.run, "key": line.key}

    def _read(self) -> None:
        for number, text in enumerate(whole_lines(self.path), start=1):
            try:
                entry = json.loads(text)
                key, run, image = entry["key"], entry["run"], entry["image"]
            except (ValueError, TypeError, KeyError):
                told = "not an answer of `tokenprune run --images`; take another --output"
                raise InputError(f"{self.path}:{number}: error: {told}") from None
            if run != self.run:
                told = "an answer of another model, recipe or length of answers; take another --output"
                raise InputError(f"{self.path}:{number}: error: {told}")
            if key not in self._lines:
                told = f"answers a question that is not asked now, or {image} has changed since; take another --output"
                raise InputError(f"{self.path}:{number}: error: {told}")
            self.answers[key] = entry

    def _unusable(self, error: OSError) -> InputError:
        return InputError(f"--output: cannot use {self.path}: {error.strerror or error}")


def _dumped(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False)
