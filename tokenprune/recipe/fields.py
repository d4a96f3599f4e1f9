"""The fields of a recipe that are neither text nor parts: where a stage acts, and what all of them may cost."""

from __future__ import annotations

from typing import Annotated, Any, cast, get_args

from pydantic import GetJsonSchemaHandler, PlainValidator, TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tokenprune.budget import Budget, BudgetKind
from tokenprune.core.place import Place, PlaceError, place_schema
from tokenprune.parts.limits import Keep, Share
from tokenprune.recipe.part_models import refuse
from tokenprune.recipe.text.node import got
from tokenprune.recipe.text.type_text import type_text

BUDGETS: tuple[str, ...] = get_args(BudgetKind)

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
    try:
        return Place.parse(value)
    except PlaceError as error:
        if error.unknown:
            at = value[error.path[0]] if error.path else value
            _refuse_unknown(at, tuple(key for key in at if key not in error.unknown), error.path)
        inner = value
        for key in error.path:
            inner = inner[key]
        refuse((error.path, error.template.replace("{got}", got(inner))))


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


def _refuse_unknown(value: dict[str, Any], known: tuple[str, ...], above: tuple[str, ...] = ()) -> None:
    """Raise for every key that is not known; the place of an unknown key is that of the key, below the keys `above`."""
    if unknown := [key for key in value if key not in known]:
        raise ValidationError.from_exception_data(
            "recipe", [{"type": "extra_forbidden", "loc": (*above, key), "input": value[key]} for key in unknown]
        )


PlaceField = Annotated[Place, PlainValidator(_place), _JsonSchema(place_schema())]

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
