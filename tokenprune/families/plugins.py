"""Families of other packages: an adapter each, found by entry points, and imported when a model of theirs comes.

A package adds a family in its own pyproject.toml, under the `model_type` of its models:

    [project.entry-points."tokenprune.families"]
    my_vl = "my_package.my_vl:MyVL"
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.adapter import Adapter

GROUP = "tokenprune.families"


def declared() -> tuple[str, ...]:
    """The `model_type` of each family that an installed package declares; none of them is imported."""
    return tuple(dict.fromkeys(entry.name for entry in _declared()))


def load(family: str) -> Adapter:
    """The adapter that a package declares for `family`.

    Raises:
        UnsupportedModelError: it cannot be used: it fails on import, is no adapter, is unfinished, or is for another
            `model_type`; or two packages declare one.
    """
    found, *more = (entry for entry in _declared() if entry.name == family)
    if more:
        told = " and ".join(f"{entry.value!r}" for entry in (found, *more))
        raise UnsupportedModelError(f"two packages bring an adapter for {family}: {told}; uninstall one of them")
    loaded = _loaded(found)
    if isinstance(loaded, str):
        raise UnsupportedModelError(loaded)
    return loaded


def check_adapter(adapter: Any, where: str) -> Adapter:
    """`adapter`, if it is a finished one.

    Args:
        adapter: an instance of a subclass of `Adapter`.
        where: opens the error message.

    Raises:
        UnsupportedModelError: it is something else, or what every adapter has is missing.
    """
    if inspect.isclass(adapter) and issubclass(adapter, Adapter):
        raise UnsupportedModelError(f"{where}: expected an adapter, got the class; write {adapter.__name__}()")
    if not isinstance(adapter, Adapter):
        raise UnsupportedModelError(
            f"{where}: expected an instance of a subclass of tokenprune.Adapter, got {type(adapter).__name__}"
        )
    for name, what in (("family", "the model_type of its models"), ("title", "its name for people")):
        if not isinstance(getattr(adapter, name, None), str):
            raise UnsupportedModelError(f"{where}: {type(adapter).__name__} has no {name}, {what}")
    return adapter


@cache
def _declared() -> tuple[EntryPoint, ...]:
    """What installed packages declare; this reads their metadata and imports none of them."""
    return tuple(entry_points(group=GROUP))


@cache
def _loaded(entry: EntryPoint) -> Adapter | str:
    """The adapter of an entry point, or why it cannot be used."""
    where = f"entry point {entry.name!r} = {entry.value!r}"
    try:
        found: Any = entry.load()
    except (Exception, SystemExit) as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        return f"{where} cannot be loaded: {type(error).__name__}: {reason}"
    if not (inspect.isclass(found) and issubclass(found, Adapter)):
        return f"{where}: expected a subclass of tokenprune.Adapter, got {found!r}"
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        return f"{where}: {found.__name__} is unfinished: write {missing}"
    try:
        adapter = check_adapter(found(), where)
    except UnsupportedModelError as error:
        return str(error)
    if adapter.family != entry.name:
        return f"{where}: its family is {adapter.family!r}; an entry point has the name of the family"
    return adapter
