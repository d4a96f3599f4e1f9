"""YAML text to `Node`: from PyYAML's event stream, with its own rules for scalars, keys, tags, aliases and sizes.

Only the pure-Python parser is used: the C one overflows its stack on deep nesting. PyYAML's constructors never run, so
no tag can do anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from tokenprune.recipe.text.node import MAX_DEPTH, MAX_NODES, KeyPath, Node, Source, Spot, dotted, got, scalar_problem
from tokenprune.recipe.text.problems import Problem
from tokenprune.recipe.text.yaml_rules import KINDS, TAG, ScalarError, read_plain

MAX_BYTES = 2**20
MAX_ALIASES = 64

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What PyYAML takes for the end of a line."""


def text_source(name: str, text: str) -> Source:
    """The source that marks in `text` refer to."""
    return Source(name, tuple(_BREAK.split(text)))


def decode(data: bytes, name: str) -> tuple[str, list[Problem]]:
    """The text of a file; a byte-order mark of UTF-8 is dropped."""
    if len(data) > MAX_BYTES:
        return "", [Problem(name, None, None, f"a recipe has at most {MAX_BYTES} bytes")]
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        # The error counts from after the byte-order mark.
        source = text_source(name, error.object[: error.start].decode())
        lines = source.lines or ("",)
        message = f"not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8"
        return "", [Spot(source, len(lines), len(lines[-1]) + 1).problem(message)]


def read_yaml(text: str, source: Source) -> tuple[Node | None, list[Problem]]:
    """The tree of a text, None when it is empty or too broken to go on, and everything wrong with it as YAML."""
    composer = _Composer(source)
    if len(text) > MAX_BYTES:
        return None, [Spot(source, 1, 1).problem(f"a recipe has at most {MAX_BYTES} bytes")]
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_event():
            composer.take(loader.get_event())  # type: ignore[no-untyped-call]
    except _Stop:
        return None, composer.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        composer.wrong(_spot(source, mark), _syntax(error))
        return None, composer.problems
    except yaml.reader.ReaderError as error:
        before = _BREAK.split(text[: error.position])
        message = f"character {chr(error.character)!r} is not allowed"
        composer.wrong(Spot(source, len(before), len(before[-1]) + 1), message)
        return None, composer.problems
    except (ValueError, OverflowError):
        # PyYAML's scanner passes on what chr() says to an escape like "\UFFFFFFFF", and what int() says to %YAML ².1.
        mark = loader.get_mark() if loader else None
        composer.wrong(_spot(source, mark), "a number or an escape here is out of range")
        return None, composer.problems
    finally:
        if loader is not None:
            loader.dispose()
    return composer.root, composer.problems


class _Stop(Exception):
    """Nothing after this point can be read."""


@dataclass
class _Frame:
    """A collection whose end has not come yet."""

    at: Spot
    into: list[Node] | dict[str, Node]
    anchor: str | None
    before: int
    """Nodes counted before it."""
    key: Node | None = None
    """The key that waits for its value."""
    height: int = 1
    skip: bool = False
    """The waiting key is not valid, so its value is read and forgotten."""


@dataclass
class _Composer:
    source: Source
    root: Node | None = None
    problems: list[Problem] = field(default_factory=list)
    _stack: list[_Frame] = field(default_factory=list)
    _anchors: dict[str, tuple[Node, int, int] | None] = field(default_factory=dict)
    """Node, its size and height; None while it is still open."""
    _aliases: int = 0
    _nodes: int = 0
    _documents: int = 0

    def wrong(self, at: Spot, message: str) -> None:
        self.problems.append(at.problem(message))

    def stop(self, at: Spot, message: str) -> _Stop:
        self.wrong(at, message)
        return _Stop()

    def take(self, event: yaml.Event) -> None:
        at = _spot(self.source, event.start_mark)
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise self.stop(at, "a recipe is one YAML document, a second one starts here")
        elif isinstance(event, yaml.ScalarEvent):
            self._count(at)
            node = Node(self._scalar(event, at), at)
            if event.anchor:
                self._anchors[event.anchor] = (node, 1, 0)
            self._add(node, 0)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event.anchor, at)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._open(event, at)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close()

    def _path(self) -> KeyPath:
        return tuple(
            str(frame.key.value if frame.key else "?") if isinstance(frame.into, dict) else len(frame.into)
            for frame in self._stack
        )

    def _count(self, at: Spot, more: int = 1) -> None:
        self._nodes += more
        if self._nodes > MAX_NODES:
            raise self.stop(at, f"more than {MAX_NODES} values, with aliases written out")

    def _scalar(self, event: yaml.ScalarEvent, at: Spot) -> str | int | float | bool | None:
        try:
            value = read_plain(event.value) if event.implicit[0] or event.tag else event.value
        except ScalarError as error:
            self.wrong(at, str(error))
            return event.value
        if message := scalar_problem(value):
            self.wrong(at, message)
            return None
        if event.tag is None:
            return value
        kind = event.tag.removeprefix(TAG)
        if event.tag == f"{TAG}str":
            return event.value
        if kind not in KINDS or event.tag == kind:
            self.wrong(at, _bad_tag(event.tag))
        elif not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            self.wrong(at, f"{got(event.value)} is not of type {kind}, as its tag says")
        return value

    def _alias(self, name: str | None, at: Spot) -> None:
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise self.stop(at, f"more than {MAX_ALIASES} aliases")
        if name is None or name not in self._anchors:
            raise self.stop(at, f"no anchor &{name} before this alias")
        found = self._anchors[name]
        if found is None:
            raise self.stop(at, f"*{name} stands inside its own anchor, so it would never end")
        node, size, height = found
        self._count(at, size)
        if len(self._stack) + height > MAX_DEPTH:
            raise self.stop(at, f"nested deeper than {MAX_DEPTH} levels")
        self._add(node, height)

    def _open(self, event: yaml.CollectionStartEvent, at: Spot) -> None:
        self._count(at)
        if len(self._stack) >= MAX_DEPTH:
            raise self.stop(at, f"nested deeper than {MAX_DEPTH} levels")
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in {None, f"{TAG}{'map' if mapping else 'seq'}"}:
            self.wrong(at, _bad_tag(event.tag))
        if event.anchor:
            self._anchors[event.anchor] = None
        self._stack.append(_Frame(at, {} if mapping else [], event.anchor, self._nodes - 1))

    def _close(self) -> None:
        frame = self._stack.pop()
        node = Node(frame.into, frame.at)
        if frame.anchor:
            self._anchors[frame.anchor] = (node, self._nodes - frame.before, frame.height)
        self._add(node, frame.height)

    def _add(self, node: Node, height: int) -> None:
        """Put a finished node where it belongs: at the top, into a list, or into a mapping as key or value."""
        if not self._stack:
            self.root = node
            return
        frame = self._stack[-1]
        frame.height = max(frame.height, height + 1)
        if isinstance(frame.into, list):
            frame.into.append(node)
        elif frame.key is None:
            self._key(frame, node)
        else:
            if not frame.skip:
                frame.into[str(frame.key.value)] = replace(node, key=frame.key.at)
            frame.key = None

    def _key(self, frame: _Frame, node: Node) -> None:
        # Whole numbers are names too: variants: {192: …}, rows: {576: 300}.
        valid = isinstance(node.value, str | int) and not isinstance(node.value, bool)
        where = dotted(self._path()[:-1])
        frame.key, frame.skip = node, not valid
        if not valid:
            self.wrong(node.at, f"keys must be text (got {got(node.value)} in {where}): quote it")
        elif isinstance(frame.into, dict) and str(node.value) in frame.into:
            first = frame.into[str(node.value)].key
            frame.skip = True
            line = f" (first on line {first.line}, column {first.column})" if first else ""
            self.wrong(node.at, f"duplicate key {str(node.value)!r} in {where}{line}")


def _spot(source: Source, mark: Any) -> Spot:
    return Spot(source, mark.line + 1, mark.column + 1) if mark else Spot(source, 1, 1)


def _bad_tag(tag: str) -> str:
    short = tag.replace(TAG, "!!")
    return f"tag {short[:60]!r} is not allowed: a recipe is plain data"


def _syntax(error: yaml.MarkedYAMLError) -> str:
    message = ", ".join(part for part in (error.context, error.problem) if part) or "not YAML"
    return f"{message} (indent with spaces, not tabs)" if r"'\t'" in message else message
