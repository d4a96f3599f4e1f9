"""`Place`: where in the model a stage acts, and all that is known of places: order, parsing, schema, printing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from tokenprune.errors import RecipeError, did_you_mean

Kind = Literal["in_vision", "after_vision", "before_layer"]
KINDS: tuple[Kind, ...] = ("in_vision", "after_vision", "before_layer")
"""In the order in which a forward comes through them."""

MAX_LAYER = 9999

_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?)%\Z", re.ASCII)
_SHARE = re.compile(r"([0-9]{1,4})/([0-9]{1,4})\Z", re.ASCII)
_BLOCK = re.compile(r"-?[0-9]{1,4}\Z", re.ASCII)
_KEYS = {"in_vision": "block", "before_layer": None}


class PlaceError(RecipeError):
    """A value that is no place.

    Args:
        template: what is wrong, with ``{got}`` where the value belongs.
        value: what was given.
        path: keys that lead to the value.
        unknown: keys that do not exist, where that is what is wrong.
    """

    def __init__(self, template: str, value: object, path: tuple[str, ...] = (), unknown: tuple[str, ...] = ()) -> None:
        super().__init__(f"place: {template.replace('{got}', repr(value))}")
        self.template = template
        self.path = path
        self.unknown = unknown


@dataclass(frozen=True)
class Place:
    """Inside the vision tower at a block, after vision (the projector's output), or before a decoder layer.

    `before_layer` names the first layer that sees fewer tokens, `in_vision` the first block of the tower that does.
    Both are numbers from 0 on, or a share of the depth.
    """

    kind: Kind
    at: int | Fraction | None = None
    """0-based layer or block, or a share of the depth (``3/32`` is layer 3 of a model with 32); None after vision."""

    @classmethod
    def parse(cls, value: Any) -> Place:
        """The place that plain data means: ``after_vision``, ``{before_layer: 3}`` or ``{in_vision: {block: 6}}``.

        Raises:
            PlaceError: it is none.
        """
        if isinstance(value, Place):
            return value
        if value == "after_vision":
            return cls("after_vision")
        if not isinstance(value, Mapping):
            inside = isinstance(value, str) and value.strip().startswith("in_vision")
            mapping = "{in_vision: {block: 6}}" if inside else "{before_layer: 3}"
            hint = did_you_mean(value, KINDS) if isinstance(value, str) and value not in KINDS else ""
            raise PlaceError(f"should be after_vision, or a mapping such as {mapping} (got {{got}}){hint}", value)
        _refuse_unknown(value, tuple(_KEYS), ())
        if not value:
            raise PlaceError("missing required key 'before_layer'", value)
        if len(value) > 1:
            raise PlaceError("should have exactly one of before_layer, in_vision", value, (list(value)[1],))
        kind, at = next(iter(value.items()))
        path: tuple[str, ...] = (kind,)
        key = _KEYS[kind]
        if key is not None:
            if not isinstance(at, Mapping):
                raise PlaceError(f"should be a mapping such as {{{key}: 6}} (got {{got}})", at, path)
            _refuse_unknown(at, (key,), path)
            if key not in at:
                raise PlaceError(f"missing required key {key!r}", at, path)
            at, path = at[key], (*path, key)
        return cls(kind, _layer(at, "block" if key else "layer", path))

    def to_plain(self) -> str | dict[str, Any]:
        """The place as a recipe writes it; `parse` reads it back."""
        if self.at is None:
            return self.kind
        at = self.at if isinstance(self.at, int) else str(self.at)
        return {self.kind: at} if self.kind == "before_layer" else {self.kind: {"block": at}}

    def layer(self, depth: int) -> int:
        """The first decoder layer (0-based) that sees fewer tokens: 0 for places in front of the decoder.

        A share of the depth is rounded half up and stays within 1 … depth - 1.

        Raises:
            RecipeError: a layer number at or beyond `depth`.
        """
        if self.kind != "before_layer" or self.at is None:
            return 0
        if isinstance(self.at, int):
            if self.at >= depth:
                raise RecipeError(f"place {self}: the model has {depth} layers, so expected 0 … {depth - 1}")
            return self.at
        return max(1, min(depth - 1, int(self.at * depth + Fraction(1, 2))))

    def precedes(self, other: Place) -> bool:
        """Whether it comes earlier than `other` in every model; a number and a share of the depth do not compare."""
        if self.kind != other.kind:
            return KINDS.index(self.kind) < KINDS.index(other.kind)
        if self.at is None or other.at is None or isinstance(self.at, Fraction) is not isinstance(other.at, Fraction):
            return False
        return self.at < other.at

    @property
    def in_decoder(self) -> bool:
        """Whether it stands before a decoder layer, so that some layers see all tokens or may."""
        return self.kind == "before_layer"

    def __str__(self) -> str:
        if self.at is None:
            return self.kind
        return f"{self.kind}: {self.at}" if self.kind == "before_layer" else f"{self.kind}: block {self.at}"


def place_name(place: str, layer: int | None) -> str:
    """Words for the place of a stage in a report: before its 0-based decoder layer, or in or after vision, where no
    layer comes before it."""
    return place.replace("_", " ") if layer is None else f"before layer {layer}"


def block_at(text: str) -> int | Fraction:
    """A block of the vision tower as signals name it: ``5``, ``-2`` (from the end), or a share of the depth, ``1/4``.

    Raises:
        PlaceError: it is none.
    """
    if _BLOCK.match(text):
        return int(text)
    return _layer(text, "block", ())


def place_schema() -> dict[str, Any]:
    """JSON Schema of a place as recipes write it."""
    layer = _number_or_share(
        "0-based number of the first layer that sees fewer tokens, or a share of the model's depth"
    )
    block = _number_or_share(
        "0-based number of the first block of the vision tower that sees fewer tokens, or a share of its depth"
    )
    return {
        "description": "Where the stage acts: inside the vision tower, after the projector, or before a layer of the "
        "language model",
        "anyOf": [
            {"const": "after_vision"},
            _object("before_layer", layer),
            _object("in_vision", _object("block", block)),
        ],
    }


def _object(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


def _number_or_share(description: str) -> dict[str, Any]:
    return {
        "description": f"{description}: 25% or 3/32",
        "anyOf": [
            {"type": "integer", "minimum": 0, "maximum": MAX_LAYER},
            {"type": "string", "pattern": r"^([0-9]{1,2}(\.[0-9]{1,6})?%|[0-9]{1,4}/[0-9]{1,4})$"},
        ],
    }


def _refuse_unknown(value: Mapping[str, Any], known: tuple[str, ...], path: tuple[str, ...]) -> None:
    unknown = tuple(key for key in value if key not in known)
    if unknown:
        raise PlaceError(f"unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}", value, path, unknown)


def _layer(value: Any, noun: str, path: tuple[str, ...]) -> int | Fraction:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LAYER:
        return value
    share: Fraction | None = None
    if isinstance(value, str):
        if percent := _PERCENT.match(value):
            share = Fraction(percent[1]) / 100
        elif (parts := _SHARE.match(value)) and int(parts[2]):
            share = Fraction(int(parts[1]), int(parts[2]))
    if share is None or not 0 < share < 1:
        expected = f"a {noun} from 0 to {MAX_LAYER}, or a share of the depth between 0 and 1, such as 25% or 3/32"
        raise PlaceError(f"should be {expected} (got {{got}})", value, path)
    return share
