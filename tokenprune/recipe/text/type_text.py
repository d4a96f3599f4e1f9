"""What a setting may be, in words: the same ones in error messages and in help."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def type_text(annotation: Any) -> str:
    """``a whole number from 1 to 256``, ``all or vision``, ``a number in (0, 1], or null`` and so on."""
    limits: dict[str, Any] = {}
    while get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        for name, value in _limits(metadata):
            limits.setdefault(name, value)
    if "words" in limits:
        return str(limits["words"])
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join(type_text(member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return _choice([str(value) for value in get_args(annotation)])
    if annotation in (int, float):
        return _NAMES[annotation] + _range(limits, whole=annotation is int)
    return _NAMES.get(annotation) or _collection(annotation)


def choices(annotation: Any) -> list[str]:
    """All texts that a `Literal` somewhere in the annotation allows."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    members = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [name for member in members for name in choices(member)]


def inside(annotation: Any, steps: int, *, key: bool = False) -> Any:
    """The annotation of an item `steps` levels inside a collection, or of a mapping's key at the last of them."""
    for step in range(steps):
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if get_origin(annotation) in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if _is_collection(member)]
            annotation = members[0] if members else annotation
        arguments = get_args(annotation) or (Any,)
        if _is_mapping(annotation) and not (key and step == steps - 1):
            annotation = arguments[-1]
        else:
            annotation = arguments[0]
    return annotation


def _limits(metadata: list[Any]) -> Iterator[tuple[str, Any]]:
    """The limits that pydantic's and annotated_types' markers hold, by name."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)
        elif isinstance(item, str):
            yield "words", item
        for name in ("ge", "gt", "le", "lt"):
            if getattr(item, name, None) is not None:
                yield name, getattr(item, name)


def _range(limits: dict[str, Any], *, whole: bool) -> str:
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None:
        if whole and "ge" in limits and "le" in limits:
            return f" from {low} to {high}"
        return f" in {'[' if 'ge' in limits else '('}{low:g}, {high:g}{']' if 'le' in limits else ')'}"
    if low is not None:
        return f" of at least {low}" if "ge" in limits else f" above {low}"
    if high is not None:
        return f" of at most {high}" if "le" in limits else f" below {high}"
    return ""


def _choice(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_collection(annotation: Any) -> bool:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Collection) and origin is not str


def _collection(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument is not ...]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    if _is_mapping(annotation):
        if len(arguments) != 2:
            return "a mapping"
        return f"a mapping, each key {type_text(arguments[0])}, each value {type_text(arguments[1])}"
    if _is_collection(annotation):
        return f"a list of {_plural(type_text(arguments[0]))}" if arguments else "a list"
    return getattr(annotation, "__name__", str(annotation))


def _plural(text: str) -> str:
    """``a whole number from 1 to 9`` in the plural; what is no noun stays as it is."""
    for noun in ("whole number", "number", "mapping", "list"):
        if text.startswith(f"a {noun}"):
            return text.replace(f"a {noun}", f"{noun}s", 1)
    return text
