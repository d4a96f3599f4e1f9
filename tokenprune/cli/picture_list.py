"""What `run --images` asks about: a folder, a pattern, picture files or a JSON-lines file, checked before it runs."""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.core.pictures import open_picture, picture_suffixes
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.study.many import Line

LISTS = (".jsonl", ".ndjson")
FIELDS = ("image", "question")
MOST = 20
"""Problems that are told one by one."""


def read_lines(sources: Sequence[str], question: str | None) -> list[Line]:
    """The questions, in the order of the list, or of the names of a folder's pictures.

    Args:
        sources: folders (the pictures in them, not in folders below), patterns such as ``photos/**/*.jpg``, picture
            files, or lists ``.jsonl`` with `image` (a path beside the list) and, where `question` is not given,
            `question`; other fields are handed on to the answers.
        question: about every picture that no line of a list asks another question about.

    Raises:
        InputError: nothing to ask, or all files and lines that are wrong, each told with its place.
    """
    from tokenprune.study.many import Line

    if question is None and not any(_is_list(source) for source in sources):
        raise InputError("--images needs --question TEXT: what to ask about each picture")
    lines: list[Line] = []
    problems: list[str] = []
    looked: dict[Path, tuple[str, tuple[int, int]]] = {}
    first: dict[tuple[str, str], str] = {}
    for where, row in _rows(sources):
        wrong = row if isinstance(row, str) else _wrong(row, question)
        if wrong or isinstance(row, str):
            problems.append(f"{where}: error: {wrong}")
            continue
        path, image = row["path"], row["shown"]
        asked = str(row.get("question") or question).strip()
        if (known := first.setdefault((image, asked), where)) != where:
            problems.append(f"{where}: error: asks the same about {image} as {known}")
            continue
        try:
            if path not in looked:
                looked[path] = _look(path)
        except InputError as error:
            told = str(error).removeprefix("image: ")
            problems.append(told if where == image else f"{where}: error: {told}")
            continue
        given = {name: value for name, value in row.items() if name not in (*FIELDS, "path", "shown")}
        lines.append(Line(path, image, *looked[path], asked, given))
    if problems:
        more = [f"error: and {len(problems) - MOST:,} more like these"] if len(problems) > MOST else []
        raise InputError("\n".join([*problems[:MOST], *more]))
    if not lines:
        raise InputError(f"--images: no pictures in {', '.join(sources)}")
    if question is not None and not any(line.question == question.strip() for line in lines):
        raise InputError("--question is asked of no picture: each line has a question of its own; leave it out")
    return lines


def _is_list(source: str) -> bool:
    return Path(source).suffix.lower() in LISTS


def _look(path: Path) -> tuple[str, tuple[int, int]]:
    from tokenprune.study.many import digest

    picture = open_picture(path, "image")
    return digest(path), picture.size


def _rows(sources: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Where each question stands, with what is known of it, or with what is wrong there."""
    for source in dict.fromkeys(sources):
        if _is_list(source):
            yield from _listed(Path(source))
            continue
        for path in _pictures(source):
            yield str(path), {"path": path, "shown": str(path)}


def _pictures(source: str) -> list[Path]:
    """The picture files of a folder or a pattern, by name, or the one file of that name."""
    if os.path.isdir(source):
        found = [path for path in Path(source).iterdir() if path.suffix.lower() in picture_suffixes()]
        return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if os.path.exists(source) or not glob.has_magic(source):
        if not os.path.exists(source):
            raise InputError(f"--images: no such folder, file or pattern: {source}")
        return [Path(source)]
    found = [Path(name) for name in glob.glob(source, recursive=True)]
    return sorted(path for path in found if path.is_file() and path.suffix.lower() in picture_suffixes())


def _listed(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"--images: no such file: {file}") from None
    except UnicodeDecodeError:
        raise InputError(f"--images: {file} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"--images: cannot read {file}: {error.strerror or error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            yield where, f"not JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield where, f"expected an object in braces, got {line.strip()[:40]}"
        elif not isinstance(row.get("image"), str) or not row["image"].strip():
            yield where, f"no image{_misspelt('image', row)}; expected the path of a picture"
        else:
            yield where, {**row, "path": file.parent / row["image"], "shown": row["image"]}


def _wrong(row: Mapping[str, Any], question: str | None) -> str:
    """What is wrong with the question of a line, or an empty string."""
    own = row.get("question")
    if own is not None and (not isinstance(own, str) or not own.strip()):
        return f"question: expected text, got {own!r}"
    if own is None and question is None:
        return f"no question{_misspelt('question', row)}, and no --question for all of them"
    return ""


def _misspelt(field: str, row: Mapping[str, Any]) -> str:
    """Which name of a line may have been meant for `field`: others are handed on, so none of them is wrong."""
    near = difflib.get_close_matches(field, row, n=1, cutoff=0.6)
    return f" (is it {near[0]!r}?)" if near and near[0] != field else ""
