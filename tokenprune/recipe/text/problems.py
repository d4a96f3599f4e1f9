"""`Problem`: one thing wrong with a recipe, and the report that shows all of them with their places."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tokenprune.errors import RecipeError

Format = Literal["text", "json", "github"]

_WIDEST = 140
"""Characters of a source line that a report shows at most."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong, and where."""

    path: str
    """The file, or ``--set``, ``<dict>`` and the like."""
    line: int | None
    """1-based; None where there is no text, as in a dict or a file that cannot be read."""
    column: int | None
    """1-based, in characters."""
    message: str
    source_line: str | None = None
    """The whole line of text that `line` names."""

    def __str__(self) -> str:
        path = _printable(self.path)
        if self.line is None or self.column is None:
            return f"{path}: error: {self.message}"
        head = f"{path}:{self.line}:{self.column}: error: {self.message}"
        if self.source_line is None:
            return head
        shown, at = _window(_printable(self.source_line), self.column - 1)
        return f"{head}\n{self.line:>6} | {shown}\n       | {_blank(shown[:at])}^"


class InvalidRecipeError(RecipeError):
    """Everything wrong with a recipe at once; `str` is the report that users see.

    Args:
        problems: at least one, in the order in which they are shown.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return format_problems(self.problems)


def format_problems(problems: Sequence[Problem], style: Format = "text") -> str:
    """The problems as text for people, as a JSON list, or as annotations of a GitHub workflow."""
    if style == "json":
        return json.dumps([asdict(problem) for problem in problems], indent=2)
    return "\n".join(map(str if style == "text" else _github, problems))


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Sorted by position within each file, files in the order in which they first appear; no problem twice."""
    unique = list(dict.fromkeys(problems))
    paths = list(dict.fromkeys(problem.path for problem in unique))
    return sorted(unique, key=lambda p: (paths.index(p.path), p.line or 0, p.column or 0))


def _github(problem: Problem) -> str:
    def escaped(text: str, also: str = "") -> str:
        return "".join(f"%{ord(c):02X}" if c in "%\r\n" + also else c for c in text)

    where = f"file={escaped(problem.path, ',:')}"
    if problem.line is not None:
        where += f",line={problem.line},col={problem.column}"
    return f"::error {where}::{escaped(problem.message)}"


def _printable(text: str) -> str:
    """`text` without characters that would move the cursor, colour the screen or reverse the direction of writing."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _window(text: str, at: int) -> tuple[str, int]:
    """The piece of a long line around index `at`, and where `at` is in it."""
    if len(text) <= _WIDEST:
        return text, at
    start = max(0, min(at - _WIDEST // 2, len(text) - _WIDEST))
    end = start + _WIDEST
    piece = ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
    return piece, at - start + bool(start)


def _blank(text: str) -> str:
    """Blanks as wide as `text` on a screen: tabs stay, wide characters count twice, combining ones not at all."""

    def width(character: str) -> int:
        if unicodedata.category(character) in {"Mn", "Me"}:
            return 0
        return 2 if unicodedata.east_asian_width(character) in "WF" else 1

    return "".join("\t" if c == "\t" else " " * width(c) for c in text)
