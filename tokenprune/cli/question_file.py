"""Pictures, questions and answers of one's own: a JSON-lines or CSV file, checked as a whole before anything runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tokenprune.study.evaluate import Case

NEEDED = ("image", "question", "answer")
FIELDS = (*NEEDED, "task", "difficulty")


def read_cases(file: Path, images: Path, *, answers: bool = True) -> list[Case]:
    """The cases of a question file; `image` is a path inside `images`, `task` and `difficulty` may be left out, and
    `answer` unless `answers`.

    Raises:
        InputError: file or folder cannot be read, or lines are wrong: each of them told with its number.
    """
    from tokenprune.study.evaluate import Case

    if not images.is_dir():
        raise InputError(f"--images: no such folder: {images}")
    cases: list[Case] = []
    problems: list[str] = []
    first: dict[tuple[str, str], int] = {}
    digests: dict[str, str] = {}
    needed = NEEDED if answers else NEEDED[:2]
    for number, row in _rows(file, needed):
        wrong = row if isinstance(row, str) else _wrong(row, needed)
        if not wrong and isinstance(row, Mapping):
            image, question, answer = (str(row.get(name) or "").strip() for name in NEEDED)
            path = images / image
            known = first.setdefault((image, question), number)
            if known != number:
                wrong = f"asks the same about {image} as line {known}"
            elif image not in digests:
                wrong, digests[image] = _look(path)
        if wrong or isinstance(row, str):
            problems.append(f"{file}:{number}: error: {_in_one_line(str(wrong))}")
            continue
        task, difficulty = (str(row.get(name) or "").strip() for name in ("task", "difficulty"))
        picture = partial(open_picture, path, "--images")
        shown = f"{image} {digests[image]}"
        cases.append(Case(picture, shown, question, answer, task or "all", difficulty, where=f"{file}:{number}"))
    if problems:
        raise InputError("\n".join(problems))
    if not cases:
        raise InputError(f"--questions: {file} has no questions")
    return cases


def _in_one_line(text: str) -> str:
    """What a message says of a cell, whatever breaks of lines and control characters it quotes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _look(path: Path) -> tuple[str, str]:
    """What is wrong with a picture file, and a digest of it."""
    try:
        open_picture(path, "image")
        return "", sha256(path.read_bytes()).hexdigest()[:12]
    except InputError as error:
        return str(error), ""


def _wrong(row: Mapping[str, Any], needed: Sequence[str]) -> str:
    """What is wrong with the fields of a line, or an empty string."""
    unknown = [name for name in row if name not in FIELDS]
    missing = [name for name in needed if row.get(name) is None or not str(row[name]).strip()]
    if unknown:
        return f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], FIELDS)}; known: {', '.join(FIELDS)}"
    if missing:
        return f"no {' and no '.join(missing)}"
    kinds = [name for name in FIELDS if isinstance(row.get(name), bool | list | dict | float)]
    return f"{kinds[0]}: expected text, got {row[kinds[0]]!r}" if kinds else ""


def _rows(file: Path, needed: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Line numbers with the fields of the line, or with what is wrong with it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"--questions: no such file: {file}") from None
    except UnicodeDecodeError:
        raise InputError(f"--questions: {file} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"--questions: cannot read {file}: {error.strerror or error}") from None
    kind = file.suffix.lower()
    if kind == ".csv":
        yield from _csv_rows(file, text, needed)
    elif kind in (".jsonl", ".ndjson"):
        yield from _json_rows(text)
    else:
        raise InputError(f"--questions: expected a file that ends in .jsonl or .csv, got {file.name}")


def _json_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else f"expected an object in braces, got {line.strip()[:40]}"


def _csv_rows(file: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    head: list[str] | None = None
    while True:
        number = reader.line_num + 1  # where the row starts: a quoted field may run over several lines
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield number, f"not CSV: {error}"
            return
        if row is None:
            return
        if head is None:
            head = [name.strip() for name in row]
            if missing := [name for name in needed if name not in head]:
                raise InputError(f"{file}:1: error: the first line names the columns; no {' and no '.join(missing)}")
        elif len(row) not in (0, len(head)):
            yield number, f"{len(row)} fields under {len(head)} column names"
        elif row:
            yield number, dict(zip(head, row, strict=True))
