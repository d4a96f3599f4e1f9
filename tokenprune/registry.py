"""The parts that recipes can name: role, name, class. Ours are found in `tokenprune.parts`, others by entry points.

A package adds a part in its own pyproject.toml, as ``role.name``; it is imported when a recipe names that part:

    [project.entry-points."tokenprune.parts"]
    "scorer.mine" = "my_package.scorers:MineScorer"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from pydantic import ValidationError

from tokenprune.errors import InputError, PluginWarning, RecipeError, did_you_mean
from tokenprune.parts.part import Part, settings_model
from tokenprune.parts.part_file import parts_of

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


_TRIED: ContextVar[Mapping[tuple[str, str], type[Part]]] = ContextVar("tried", default=MappingProxyType({}))
"""Parts of the files that `trying` has read, by role and name."""


def names(role: str) -> tuple[str, ...]:
    """The names that recipes may give to a part of `role`, in alphabetical order; no plug-in is imported for them.

    Raises:
        RecipeError: an unknown role.
    """
    if role not in _FOLDERS:
        raise RecipeError(f"unknown role {role!r}{did_you_mean(role, ROLES)}; expected one of: {', '.join(ROLES)}")
    tried = (name for kind, name in _TRIED.get() if kind == role)
    theirs = (entry.name.partition(".")[2] for entry in _declared() if entry.name.startswith(f"{role}."))
    return tuple(sorted({*_shipped(role), *theirs, *tried}))


def get(role: str, name: str) -> type[Part]:
    """The part called `name`; a plug-in is imported when a recipe names its part, and not before.

    Raises:
        RecipeError: no such part, and the known names and the nearest one are told; or a plug-in's that cannot be
            used: it fails on import, is of the wrong kind, shares its name, or recipes cannot call its constructor.
    """
    known = names(role)
    if name not in known:
        raise RecipeError(f"unknown {role} {name!r}{did_you_mean(name, known)}; expected one of: {', '.join(known)}")
    if (role, name) in _TRIED.get():
        return _TRIED.get()[role, name]
    if name in _shipped(role):
        return _shipped(role)[name]
    found, *more = (entry for entry in _declared() if entry.name == f"{role}.{name}")
    if more:
        told = " and ".join(f"{entry.value!r}" for entry in (found, *more))
        raise RecipeError(f"two packages bring a {role} {name!r}: {told}; uninstall one of them")
    loaded = _loaded(found, role)
    if isinstance(loaded, str):
        raise RecipeError(loaded)
    return loaded


def parts(role: str) -> Mapping[str, type[Part]]:
    """Every part of `role` by its registered name, in alphabetical order; of plug-ins that fail it warns once.

    Raises:
        RecipeError: an unknown role.
    """
    found: dict[str, type[Part]] = {}
    for name in names(role):
        try:
            found[name] = get(role, name)
        except RecipeError as error:
            _warn_once(str(error))
    for entry in _declared():
        kind, _, name = entry.name.partition(".")
        if kind == role and name in _shipped(role):
            ours = _shipped(role)[name]
            taken = f"there is a {role} {name!r} already, {ours.__module__}.{ours.__name__}"
            _warn_once(f"{_where(entry)} is left out: {taken}")
    return MappingProxyType(found)


@contextmanager
def trying(files: Sequence[Path]) -> Iterator[None]:
    """While the block runs, recipes may name the parts that these Python files define.

    Raises:
        InputError: a file that cannot be read, fails, or defines no part.
        RecipeError: a part that recipes cannot use, or whose name is taken.
    """
    with ExitStack() as stack:
        for file in files:
            tried = dict(_TRIED.get())
            for made in stack.enter_context(parts_of(file)):
                where = f"--plugin: {file}: {made.__name__}"
                role, name = str(getattr(made, "role", None)), made.name()
                if name in names(role) or (role, name) in tried:
                    raise RecipeError(f"{where}: there is a {role} {name!r} already; choose another name")
                check_constructor(made, where)
                tried[role, name] = made
            stack.callback(_TRIED.reset, _TRIED.set(MappingProxyType(tried)))
        yield


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


@cache
def _shipped(role: str) -> Mapping[str, type[Part]]:
    """The parts that the files of a role's folder define; what they import from each other is skipped."""
    folder = f"tokenprune.parts.{_FOLDERS[role]}"
    package = importlib.import_module(folder)
    found: dict[str, type[Part]] = {}
    for file in pkgutil.iter_modules(package.__path__, f"{folder}."):
        module = importlib.import_module(file.name)
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        for part in own:
            if issubclass(part, Part) and not inspect.isabstract(part):
                check_constructor(part, f"{part.__module__}.{part.__name__}")
                found[part.name()] = part
    return MappingProxyType(found)


@cache
def _declared() -> tuple[EntryPoint, ...]:
    """What installed packages declare; this reads their metadata and imports none of them."""
    return tuple(entry_points(group=GROUP))


def _where(entry: EntryPoint) -> str:
    return f"entry point {entry.name!r} = {entry.value!r}"


@cache
def _loaded(entry: EntryPoint, role: str) -> type[Part] | str:
    """A plug-in's part, or why it cannot be used."""
    try:
        part: Any = entry.load()
    except (Exception, SystemExit) as error:
        own = ", ".join(sorted(other.name for other in _declared() if other.module == entry.module))
        reason = (str(error).strip() or "no message").splitlines()[0]
        return f"plug-in {entry.module!r} ({own}) cannot be loaded: {type(error).__name__}: {reason}"
    where = _where(entry)
    if not (inspect.isclass(part) and issubclass(part, Part)) or inspect.isabstract(part):
        return f"{where}: expected a concrete subclass of tokenprune's Part, got {part!r}"
    if getattr(part, "role", None) != role:
        return f"{where}: its role is {getattr(part, 'role', None)!r}, expected {role!r}"
    if entry.name != f"{role}.{part.name()}":
        return f"{where}: expected the entry point's name to be '{role}.{part.name()}'"
    try:
        check_constructor(part, where)
    except RecipeError as error:
        return str(error)
    return part


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, PluginWarning, stacklevel=3)


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
