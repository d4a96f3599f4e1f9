"""Help about parts, from their docstrings and signatures: nothing is written twice."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import get_type_hints

from docstring_parser import DocstringStyle, parse

from tokenprune.parts.part import Part
from tokenprune.recipe.text.type_text import type_text


@dataclass(frozen=True)
class ArgumentHelp:
    """One setting of a part."""

    name: str
    type: str
    """What it may be, in words."""
    default: str | None
    """As YAML writes it; None when it must be given."""
    help: str


@dataclass(frozen=True)
class PartHelp:
    """What `tokenprune ls` and the docs say about a part."""

    name: str
    role: str
    summary: str
    args: tuple[ArgumentHelp, ...]


def describe_part(part: type[Part]) -> PartHelp:
    """Help about a part: the first line of its docstring, and its arguments with types, defaults and explanations."""
    text = inspect.cleandoc(part.__doc__ or "")
    explained = _arguments(text)
    hints = get_type_hints(part.__init__, include_extras=True)
    arguments = tuple(
        ArgumentHelp(
            name=name,
            type=type_text(hints[name]) if name in hints else "",
            default=None if parameter.default is parameter.empty else yaml_text(parameter.default),
            help=explained.get(name, ""),
        )
        for name, parameter in inspect.signature(part).parameters.items()
    )
    return PartHelp(part.name(), part.role, text.partition("\n")[0].strip(), arguments)


def yaml_text(value: object) -> str:
    """A default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _arguments(docstring: str) -> dict[str, str]:
    """Argument to explanation, from the ``Args:`` section."""
    parsed = parse(docstring, style=DocstringStyle.GOOGLE)
    return {
        argument.arg_name: " ".join((argument.description or "").split()).replace("``", "`")
        for argument in parsed.params
    }
