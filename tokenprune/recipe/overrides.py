"""Overrides: ``--set stages.first.scheduler.keep=8``, and the same paths in the `variants` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from tokenprune.errors import did_you_mean
from tokenprune.recipe.merge import expand_part
from tokenprune.recipe.text.node import MAX_DEPTH, Node, Spot, dotted, got
from tokenprune.recipe.text.problems import Problem
from tokenprune.recipe.text.yaml_reader import read_yaml, text_source
from tokenprune.registry import ROLES

DEFAULT_PARTS = {"scorer": "constant", "scheduler": "solved", "sampler": "top_k", "recycler": "drop"}
"""What a stage uses where it names no part."""

_FIXED = ("version", "extends", "variants")
_INDEX = re.compile(r"[0-9]{1,4}\Z", re.ASCII)


class _CannotSet(Exception):
    """The path of an override leads nowhere; its text is the message, `offset` where in the path it goes wrong."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


def apply_set(root: Node, expression: str) -> tuple[Node, list[Problem]]:
    """The recipe with one ``PATH=VALUE`` applied; every position afterwards points into the expression."""
    source = text_source("--set", expression)
    path, equals, text = expression.partition("=")
    if not equals:
        message = "expected PATH=VALUE, for example stages.0.scheduler.keep=64"
        return root, [Spot(source, 1, 1).problem(message)]
    if "\n" in path or "\r" in path:
        return root, [Spot(source, 1, 1).problem("the path must stand on one line")]
    # Blanks in place of `PATH=`, so that columns in YAML errors match the expression.
    value, problems = read_yaml(" " * (len(path) + 1) + text, source)
    if problems:
        return root, problems
    start = Spot(source, 1, len(path) + 2)
    return apply(root, path, value or Node(None, start), Spot(source, 1, 1))


def apply(root: Node, path: str, value: Node, at: Spot) -> tuple[Node, list[Problem]]:
    """The recipe with `value` at the dotted `path`, which stands at `at`."""
    keys = path.strip().split(".")
    if not all(keys) or len(keys) > MAX_DEPTH:
        return root, [at.problem(f"expected a path such as stages.0.scheduler.keep (got {got(path)})")]
    if keys[0] in _FIXED:
        return root, [at.problem(f"{keys[0]} cannot be overridden")]
    offsets = [len(path) - len(path.lstrip()) + sum(len(key) + 1 for key in keys[:index]) for index in range(len(keys))]
    spots = [replace(at, column=at.column + offset) if at.line else at for offset in offsets]
    try:
        return _put(root, keys, 0, value, spots), []
    except _CannotSet as error:
        return root, [spots[error.offset].problem(str(error))]


def _put(node: Node, keys: Sequence[str], depth: int, value: Node, spots: Sequence[Spot]) -> Node:
    """A copy of `node`, which stands at ``keys[:depth]``, with `value` below it."""
    if depth == len(keys):
        return replace(expand_part(value) if _is_part(keys) else value, key=spots[-1])
    key, here = keys[depth], dotted(tuple(keys[:depth]))
    if isinstance(node.value, list):
        index = _index(node, key, here, depth)
        items = list(node.value)
        items[index] = _put(items[index], keys, depth + 1, value, spots)
        return replace(node, value=items)
    if not isinstance(node.value, dict):
        raise _CannotSet(depth, f"{here} has no key {key!r}: it is {got(node.plain())}")
    replaces_budget = depth == 1 and keys[0] == "budget"
    replaces_part = depth == 3 and key == "type" and len(keys) == 4 and _is_part(keys[:3]) and _changes(node, value)
    if replaces_budget or replaces_part:
        # A budget has one key, and another part has other keys: what was there before goes.
        return Node({key: replace(value, key=spots[-1])}, value.at, node.key)
    child = node.value.get(key)
    if child is None or (child.value is None and depth + 1 < len(keys)):
        child = _missing(keys[: depth + 1], spots[depth])
    return node.with_entries(**{key: _put(child, keys, depth + 1, value, spots)})


def _missing(keys: Sequence[str], at: Spot) -> Node:
    """What stands where nothing was written: an empty mapping, or the default part of a role."""
    default = DEFAULT_PARTS.get(keys[-1]) if _is_part(keys) else None
    return Node({} if default is None else {"type": Node(default, at, at)}, at, at)


def _is_part(keys: Sequence[str]) -> bool:
    return len(keys) == 3 and keys[0] == "stages" and keys[2] in ROLES


def _changes(node: Node, value: Node) -> bool:
    return "type" not in node.mapping or node.mapping["type"].value != value.value


def _index(node: Node, key: str, here: str, depth: int) -> int:
    """The index that `key`, a number or a stage's name, stands for."""
    names = [item.mapping["name"].value if "name" in item.mapping else None for item in node.items]
    if key in names:
        return names.index(key)
    default = re.match(r"stage_([0-9]{1,4})\Z", key, re.ASCII)
    number = key if _INDEX.match(key) else default[1] if default else None
    if number is None:
        known = [name for name in names if isinstance(name, str)]
        named = f"; named are: {', '.join(known)}" if known else "; none has a name"
        raise _CannotSet(depth, f"{here} has no item {key!r}{did_you_mean(key, known)}{named}")
    if int(number) >= len(node.items) or (default and names[int(number)] is not None):
        many = f"0 … {len(node.items) - 1}" if node.items else "none"
        raise _CannotSet(depth, f"{here} has no item {key!r}: there are {many}")
    return int(number)
