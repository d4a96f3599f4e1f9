"""From pydantic's errors to problems that point at the text and say what was got and what was expected."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tokenprune.errors import did_you_mean
from tokenprune.recipe.again import Again
from tokenprune.recipe.part_models import model_called
from tokenprune.recipe.schema import BUDGETS, Recipe, StageSpec
from tokenprune.recipe.text.node import KeyPath, Node, dotted, follow, got
from tokenprune.recipe.text.problems import Problem
from tokenprune.recipe.text.type_text import choices, inside, type_text
from tokenprune.registry import ROLES


def explain(error: ValidationError, root: Node) -> list[Problem]:
    """One problem for each value that is wrong, at its place in `root`."""
    found: dict[tuple[KeyPath, str], Problem] = {}
    for detail in error.errors(include_url=False, include_context=True):
        path, problem = _explain(detail, root)
        # A value that fits no member of a union gives one error for each member: one message is enough.
        found.setdefault((path, problem.message), problem)
    return list(found.values())


def _explain(detail: ErrorDetails, root: Node) -> tuple[KeyPath, Problem]:
    kind, loc = detail["type"], detail["loc"]
    if kind == "missing":
        node, path = follow(root, loc[:-1])
        where = "" if not path else f"{dotted(path)}: "
        return path, node.at.problem(f"{where}missing required key {loc[-1]!r}")
    node, path = follow(root, loc)
    if kind == "extra_forbidden":
        key, parent = str(path[-1]), path[:-1]
        allowed = _keys(parent, root)
        hint = did_you_mean(key, allowed)
        message = f"unknown key {key!r} in {dotted(parent)}{hint}; allowed: {', '.join(allowed)}"
        return path, (node.key or node.at).problem(message)
    if kind == "rule":
        return path, node.at.problem(f"{dotted(_about(loc, path))}: {detail['msg']}")
    if loc[-1:] == ("[key]",):
        spot, value, annotation = node.key or node.at, str(path[-1]), _annotation(path, root, key=True)
    else:
        spot, value, annotation = node.at, node.plain(), _annotation(path, root)
    hint = _nearest(value, choices(annotation))
    return path, spot.problem(f"{dotted(path)}: should be {type_text(annotation)} (got {got(value)}){hint}")


def _about(loc: KeyPath, path: KeyPath) -> KeyPath:
    """What a rule is about: a part, not its type; and a part that was left out, not the stage."""
    if len(loc) == 4 and loc[-1] == "type":
        return loc[:3]
    return loc if len(loc) == 3 and loc[0] == "stages" else path


def _home(path: KeyPath, root: Node) -> tuple[type[BaseModel] | None, KeyPath]:
    """The model that the path's last keys belong to, and those keys."""
    if path[:1] == ("again",):
        return Again, path[1:]
    if len(path) < 2 or path[0] != "stages":
        return Recipe, path
    if len(path) < 3 or path[2] not in ROLES:
        return StageSpec, path[2:]
    kind = follow(root, (*path[:3], "type"))[0].value
    return model_called(str(path[2]), str(kind)), path[3:]


def _keys(path: KeyPath, root: Node) -> list[str]:
    """The keys that the mapping at `path` may have."""
    if path[-1:] == ("budget",):
        return list(BUDGETS)
    if path[-1:] == ("place",):
        return ["before_layer", "in_vision"]
    if path[-2:] == ("place", "in_vision"):
        return ["block"]
    model, _ = _home(path, root)
    keys = list(model.model_fields) if model else []
    return [*keys, "extends"] if model is Recipe else keys


def _annotation(path: KeyPath, root: Node, *, key: bool = False) -> Any:
    """The annotation, limits included, of the value at `path`, or of the last key of the path."""
    model, rest = _home(path, root)
    if not rest:
        return StageSpec if model is StageSpec else dict
    field = model.model_fields.get(str(rest[0])) if model else None
    if field is None:
        return Any
    annotation: Any = field.annotation
    for item in field.metadata:
        annotation = Annotated[annotation, item]
    return inside(annotation, len(rest) - 1, key=key)


def _nearest(value: object, known: list[str]) -> str:
    if not isinstance(value, str) or not difflib.get_close_matches(value, known, n=1, cutoff=0.6):
        return ""
    return did_you_mean(value, known)
