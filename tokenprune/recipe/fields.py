"""The fields of a recipe that are neither text nor parts: where a stage acts, and what all of them may cost."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any, cast, get_args

from pydantic import GetJsonSchemaHandler, PlainValidator, TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tokenprune.budget import Budget, BudgetKind
from tokenprune.core.place import Place
from tokenprune.errors import did_you_mean
from tokenprune.parts.limits import Keep, Share
from tokenprune.recipe.part_models import refuse
from tokenprune.recipe.text.node import got
from tokenprune.recipe.text.type_text import type_text

MAX_LAYER = 9999
BUDGETS: tuple[str, ...] = get_args(BudgetKind)

_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?)%\Z", re.ASCII)
_SHARE = re.compile(r"([0-9]{1,4})/([0-9]{1,4})\Z", re.ASCII)
_KEEPS: dict[str, Any] = {kind: Share if kind == "flops" else Keep for kind in BUDGETS}
_keeps: dict[str, TypeAdapter[int | float]] = {
    kind: TypeAdapter(keep, config={"strict": True, "allow_inf_nan": False}) for kind, keep in _KEEPS.items()
}


class _JsonSchema:
    """A JSON Schema for a field whose validator is a function."""

    def __init__(self, schema: JsonSchemaValue) -> None:
        self.schema = schema

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return dict(self.schema)


def _place(value: Any) -> Place:
    if isinstance(value, Place):
        return value
    if value == "after_vision":
        return Place("after_vision")
    if not isinstance(value, dict):
        hint = did_you_mean(value, ["after_vision"]) if isinstance(value, str) else ""
        refuse(((), f"should be after_vision, or a mapping such as {{before_layer: 3}} (got {got(value)}){hint}"))
    _refuse_unknown(value, ("before_layer",))
    if "before_layer" not in value:
        refuse(((), "missing required key 'before_layer'"))
    return Place("before_layer", _layer(value["before_layer"]))


def _layer(value: Any) -> int | Fraction:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LAYER:
        return value
    share: Fraction | None = None
    if isinstance(value, str):
        if percent := _PERCENT.match(value):
            share = Fraction(percent[1]) / 100
        elif (parts := _SHARE.match(value)) and int(parts[2]):
            share = Fraction(int(parts[1]), int(parts[2]))
    if share is None or not 0 < share < 1:
        expected = f"a layer from 0 to {MAX_LAYER}, or a share of the depth between 0 and 1, such as 25% or 3/32"
        refuse((("before_layer",), f"should be {expected} (got {got(value)})"))
    return share


def _budget(value: Any) -> Budget:
    if isinstance(value, Budget):
        return value
    expected = f"exactly one of {', '.join(BUDGETS)}"
    if not isinstance(value, dict):
        refuse(((), f"should be a mapping with {expected} (got {got(value)})"))
    _refuse_unknown(value, BUDGETS)
    if len(value) != 1:
        refuse(((*list(value)[1:2],), f"should have {expected} (got {', '.join(value) or 'none'})"))
    ((kind, keep),) = value.items()
    try:
        value = _keeps[kind].validate_python(keep)
    except ValidationError:
        refuse(((kind,), f"should be {type_text(_KEEPS[kind])} (got {got(keep)})"))
    return Budget(cast("BudgetKind", kind), value)


def _refuse_unknown(value: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise for every key that is not known; the place of an unknown key is that of the key."""
    if unknown := [key for key in value if key not in known]:
        raise ValidationError.from_exception_data(
            "recipe", [{"type": "extra_forbidden", "loc": (key,), "input": value[key]} for key in unknown]
        )


def place_to_plain(place: Place) -> str | dict[str, int | str]:
    """The place as a recipe writes it."""
    if place.at is None:
        return "after_vision"
    return {"before_layer": place.at if isinstance(place.at, int) else str(place.at)}


PlaceField = Annotated[
    Place,
    PlainValidator(_place),
    _JsonSchema(
        {
            "description": "Where the stage acts: after the projector, or before a layer of the language model",
            "anyOf": [
                {"const": "after_vision"},
                {
                    "type": "object",
                    "properties": {
                        "before_layer": {
                            "description": "0-based number of the first layer that sees fewer tokens, or a share of "
                            "the model's depth: 25% or 3/32",
                            "anyOf": [
                                {"type": "integer", "minimum": 0, "maximum": MAX_LAYER},
                                {"type": "string", "pattern": r"^([0-9]{1,2}(\.[0-9]{1,6})?%|[0-9]{1,4}/[0-9]{1,4})$"},
                            ],
                        }
                    },
                    "required": ["before_layer"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]

BudgetField = Annotated[
    Budget,
    PlainValidator(_budget),
    _JsonSchema(
        {
            "type": "object",
            "properties": {
                kind: {"description": text, **TypeAdapter(_KEEPS[kind]).json_schema()}
                for kind, text in {
                    "keep": "Average over the layers from the first place on; with one stage, exactly the survivors",
                    "average": "Average over all layers of the tokens that enter them",
                    "final": "Tokens after the last stage",
                    "flops": "Share of the multiply-adds of the untouched prefill, from the pixels to the first token, "
                    "the recipe's own included",
                }.items()
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        }
    ),
]
