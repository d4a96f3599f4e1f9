"""The parts that recipes can name: role, name, class. Ours are found in `tokenprune.parts`, others by entry points.

A package adds a part in its own pyproject.toml, as ``role.name``; nothing is imported before a recipe asks:

    [project.entry-points."tokenprune.parts"]
    "scorer.mine" = "my_package.scorers:MineScorer"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, get_type_hints

from pydantic import ValidationError

from tokenprune.errors import InputError, RecipeError, did_you_mean
from tokenprune.parts.part import Part, settings_model

GROUP = "tokenprune.parts"

_FOLDERS = {
    "raters": "raters",
    "scorer": "scorers",
    "scheduler": "schedulers",
    "grouper": "groupers",
    "sampler": "samplers",
    "recycler": "recyclers",
    "rectifier": "rectifiers",
}

ROLES = tuple(_FOLDERS)
"""The roles of a stage, in the order in which they act."""


@cache
def parts(role: str) -> Mapping[str, type[Part]]:
    """Every part of `role` by its registered name, in alphabetical order.

    Raises:
        RecipeError: an unknown role; or a part that cannot be used: of the wrong kind, a name that is taken, a
            constructor that recipes cannot call.
    """
    if role not in _FOLDERS:
        raise RecipeError(f"unknown role {role!r}{did_you_mean(role, ROLES)}; expected one of: {', '.join(ROLES)}")
    found: dict[str, type[Part]] = {}
    for part in _shipped(f"tokenprune.parts.{_FOLDERS[role]}"):
        _add(found, role, part, where=f"{part.__module__}.{part.__name__}")
    for entry in entry_points(group=GROUP):
        if entry.name.startswith(f"{role}."):
            _add(found, role, _load(entry, role), where=f"entry point {entry.name!r} = {entry.value!r}")
    return MappingProxyType(dict(sorted(found.items())))


def get(role: str, name: str) -> type[Part]:
    """The part called `name`.

    Raises:
        RecipeError: no such part; the known names and the nearest one are told.
    """
    known = parts(role)
    if name not in known:
        raise RecipeError(f"unknown {role} {name!r}{did_you_mean(name, known)}; expected one of: {', '.join(known)}")
    return known[name]


def part(role: str, name: str, /, **settings: Any) -> Part:
    """A part by its name, as a recipe names it: ``part("scheduler", "fixed", keep=64)``.

    Args:
        role: one of `ROLES`.
        name: registered name.
        settings: the constructor's arguments.

    Raises:
        RecipeError: no such role or part.
        InputError: a setting that is missing, unknown, of the wrong type or out of range.
    """
    made = get(role, name)
    known = inspect.signature(made).parameters
    names = ", ".join(known) or "none"
    for key in settings:
        if key not in known:
            raise InputError(f"{role} {name!r}: unknown setting {key!r}{did_you_mean(key, known)}; known: {names}")
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in settings]
    if missing:
        raise InputError(f"{role} {name!r}: missing setting {', '.join(map(repr, missing))}")
    return made(**settings)


def _add(found: dict[str, type[Part]], role: str, part: type[Part], where: str) -> None:
    name = part.name()
    if name in found:
        raise RecipeError(
            f"{where}: there is a {role} {name!r} already, {found[name].__module__}.{found[name].__name__}"
        )
    check_constructor(part, where)
    found[name] = part


def _shipped(folder: str) -> Iterator[type[Part]]:
    """The parts that the files of a folder define; what they import from each other is skipped."""
    package = importlib.import_module(folder)
    for file in pkgutil.iter_modules(package.__path__, f"{folder}."):
        module = importlib.import_module(file.name)
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        yield from (part for part in own if issubclass(part, Part) and not inspect.isabstract(part))


def _load(entry: EntryPoint, role: str) -> type[Part]:
    where = f"entry point {entry.name!r} = {entry.value!r}"
    try:
        part: Any = entry.load()
    except Exception as error:
        raise RecipeError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(part) and issubclass(part, Part)) or inspect.isabstract(part):
        raise RecipeError(f"{where}: expected a concrete subclass of tokenprune's Part, got {part!r}")
    if getattr(part, "role", None) != role:
        raise RecipeError(f"{where}: its role is {getattr(part, 'role', None)!r}, expected {role!r}")
    if entry.name != f"{role}.{part.name()}":
        raise RecipeError(f"{where}: expected the entry point's name to be '{role}.{part.name()}'")
    return part


def check_constructor(part: type[Part], where: str) -> None:
    """Raise `RecipeError` unless a recipe can call the constructor: keyword-only, annotated, defaults within limits."""
    hints = get_type_hints(part.__init__)
    for key, parameter in inspect.signature(part).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise RecipeError(f"{where}: argument {key!r} must be keyword-only")
        if key not in hints:
            raise RecipeError(f"{where}: argument {key!r} must have a type annotation")
    try:
        settings_model(part)()
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "missing":  # an argument without default
                default = f"default {problem['loc'][0]}={problem['input']!r}"
                raise RecipeError(f"{where}: {default}: {problem['msg']}") from None
