"""`Node`: plain data that knows where it was written, so that every later complaint can point at it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenprune.recipe.text.problems import Problem

KeyPath = tuple[str | int, ...]
"""Keys and indices that lead from the top of a recipe to a value."""

MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Source:
    """A text that recipes are read from: a file, a ``--set`` expression; or a dict, which has no lines."""

    name: str
    lines: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Spot:
    """A place in a source; line and column are 1-based, and 0 in a dict."""

    source: Source
    line: int = 0
    column: int = 0

    def problem(self, message: str) -> Problem:
        lines = self.source.lines
        if lines is None:
            return Problem(self.source.name, None, None, message)
        # A mark at the very end may stand one line below the last one.
        line = min(self.line, len(lines))
        column = self.column if line == self.line else len(lines[-1]) + 1
        text = lines[line - 1]
        return Problem(self.source.name, line, min(column, len(text) + 1), message, text)


@dataclass(frozen=True, eq=False)
class Node:
    """A scalar, a list or a mapping, with the spot of the value and of the key that leads to it."""

    value: str | int | float | bool | list[Node] | dict[str, Node] | None
    at: Spot
    key: Spot | None = None

    @property
    def mapping(self) -> dict[str, Node]:
        """Its entries, none when it is not a mapping."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """Its items, none when it is not a list."""
        return self.value if isinstance(self.value, list) else []

    def with_entries(self, **entries: Node) -> Node:
        """A copy of a mapping with some entries added or replaced."""
        return replace(self, value={**self.mapping, **entries})

    def plain(self) -> Any:
        """The data without its spots."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def dotted(path: KeyPath) -> str:
    """``stages.0.scheduler``; ``the recipe`` for the top."""
    return ".".join(map(str, path)) or "the recipe"


def follow(root: Node, path: KeyPath) -> tuple[Node, KeyPath]:
    """The deepest node that `path` leads to, skipping entries that are no keys here; and the entries that it took."""
    node, taken = root, []
    for entry in path:
        if isinstance(node.value, dict) and entry in node.value:
            node = node.value[str(entry)]
        elif isinstance(node.value, list) and isinstance(entry, int) and entry < len(node.value):
            node = node.value[entry]
        else:
            continue
        taken.append(entry)
    return node, tuple(taken)


def got(value: object) -> str:
    """What was given, short enough for a message and in the words of YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = repr(value)
    if len(text) > 60:
        text = f"{text[:56]}…{text[-1]}"
    return text


def scalar_problem(value: str | int | float | bool | None) -> str | None:
    """Why a recipe may not hold this scalar; None when it may."""
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return "half of a surrogate pair is not text"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "this number is too large"
    if isinstance(value, float) and not math.isfinite(value):
        return f"numbers must be finite (got {value})"
    return None


def from_data(data: object, source: Source) -> tuple[Node, list[Problem]]:
    """A tree from plain Python data, and what is not plain in it."""
    problems: list[Problem] = []
    spot = Spot(source)
    count = 0

    def wrong(path: KeyPath, message: str) -> Node:
        problems.append(spot.problem(f"{dotted(path)}: {message}"))
        return Node(None, spot)

    def convert(value: object, path: KeyPath) -> Node:
        nonlocal count
        count += 1
        if len(path) >= MAX_DEPTH or count > MAX_NODES:
            return wrong(path[:3], f"deeper than {MAX_DEPTH} levels, or more than {MAX_NODES} values")
        if isinstance(value, Mapping):
            entries: dict[str, Node] = {}
            for key, item in value.items():
                if isinstance(key, bool) or not isinstance(key, str | int):
                    wrong(path, f"keys must be text (got {got(key)})")
                elif message := scalar_problem(key):
                    wrong(path, message)
                elif str(key) in entries:
                    wrong(path, f"duplicate key {str(key)!r}")
                else:
                    entries[str(key)] = replace(convert(item, (*path, str(key))), key=spot)
            return Node(entries, spot)
        if isinstance(value, list | tuple):
            return Node([convert(item, (*path, index)) for index, item in enumerate(value)], spot)
        if value is not None and not isinstance(value, str | int | float):
            return wrong(
                path, f"should be text, a number, true, false, null, a list or a mapping (got {type(value).__name__})"
            )
        # Subclasses, such as numpy's float64, become what they stand for.
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                value = kind(value)
                break
        message = scalar_problem(value)
        return wrong(path, message) if message else Node(value, spot)

    return convert(data, ()), problems
