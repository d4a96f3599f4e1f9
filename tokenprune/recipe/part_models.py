"""Parts as recipes see them: one pydantic model for each, made from its constructor's signature."""

from __future__ import annotations

import inspect
import json
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NoReturn, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema, to_jsonable_python

from tokenprune.errors import RecipeError, TokenPruneError, did_you_mean
from tokenprune.parts.part import Part
from tokenprune.recipe.part_help import describe_part
from tokenprune.recipe.text.node import got
from tokenprune.registry import get, names, parts

MAX_INTEGER = 2**31 - 1
"""The largest number that a part may be given where its constructor states no limit."""


class Spec(BaseModel):
    """Base of all models of a recipe: nothing unknown, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


class PartSpec(Spec):
    """The type and settings of one part. Subclasses are made by `part_model`."""

    role: ClassVar[str] = ""
    part: ClassVar[type[Part]] = Part
    type: str

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, all of them, defaults filled in."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "type"}

    def build(self) -> Part:
        """The part itself."""
        return self.part(**self.settings())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"type": self.type, **{key: to_plain(value) for key, value in self.settings().items()}}

    def __reduce__(self) -> tuple[Any, ...]:
        # Generated classes cannot be found by name, so a copy in another process is made anew.
        return make_part, (self.role, self.to_dict())


class PartOf:
    """Annotation of a field that holds a part of one role: what is registered is looked up when a recipe is read."""

    def __init__(self, role: str) -> None:
        self.role = role

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: make_part(self.role, value))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        models = part_models(self.role)
        short = [name for name, model in models.items() if not _required(model)]
        long = [handler(model.__pydantic_core_schema__) for model in models.values()]
        return {"anyOf": [{"enum": short}, {"oneOf": long}]}


def make_part(role: str, value: object) -> PartSpec:
    """The model of a part from ``{"type": …}`` or from its name.

    Raises:
        ValidationError: no such part, or settings that it does not take.
    """
    if isinstance(value, PartSpec) and value.role == role:
        return value
    data = {"type": value} if isinstance(value, str) else value
    known = names(role)
    if not isinstance(data, dict):
        refuse(((), f"should be the name of a part, or a mapping with a `type` (got {got(data)})"))
    if "type" not in data:
        refuse(((), f"needs a `type:`; known: {', '.join(known)}"))
    name = data["type"]
    if not isinstance(name, str):
        refuse((("type",), f"`type` should be the name of a part (got {got(name)}); known: {', '.join(known)}"))
    if name not in known:
        refuse((("type",), f"no such part {got(name)}{did_you_mean(name, known)}; known: {', '.join(known)}"))
    try:
        model = part_model(get(role, name), name)
    except RecipeError as error:  # of a plug-in
        refuse((("type",), str(error)))
    # As JSON, because there a list may stand for a tuple even when everything else is strict.
    spec = model.model_validate_json(json.dumps(data))
    try:
        spec.build()  # settings may contradict each other in ways that only the constructor knows
    except TokenPruneError as error:
        refuse(((), str(error).removeprefix(f"{role} {name!r}: ")))
    return spec


def refuse(*problems: tuple[tuple[str | int, ...], str]) -> NoReturn:
    """Raise a `ValidationError` with these messages, each at its place below the value that is being validated."""
    details = [
        InitErrorDetails(type=PydanticCustomError("rule", "{text}", {"text": text}), loc=place, input=None)
        for place, text in problems
    ]
    raise ValidationError.from_exception_data("recipe", details)


def part_models(role: str) -> dict[str, type[PartSpec]]:
    """Name to model, of every part that can be used for `role` now; plug-ins are imported for it."""
    return {name: part_model(part, name) for name, part in parts(role).items()}


def model_called(role: str, name: str) -> type[PartSpec] | None:
    """The model of the part of that name; None where there is none that can be used."""
    try:
        return part_model(get(role, name), name)
    except RecipeError:
        return None


@cache
def part_model(part: type[Part], name: str) -> type[PartSpec]:
    """The model of one part."""
    fields: dict[str, Any] = {"type": (Literal[name], ...)}
    help_texts = {argument.name: argument.help for argument in describe_part(part).args}
    for parameter, annotation in _signature(part):
        required = parameter.default is inspect.Parameter.empty
        help_text = Field(description=help_texts.get(parameter.name) or None)
        described: Any = Annotated[_bounded(annotation), help_text]
        fields[parameter.name] = (described, ... if required else parameter.default)
    model = create_model(part.__name__, __base__=PartSpec, __doc__=describe_part(part).summary, **fields)
    model.role = part.role
    model.part = part
    return model


def _signature(part: type[Part]) -> list[tuple[inspect.Parameter, Any]]:
    """The constructor's parameters with their annotations; the registry has checked their kinds, types and defaults.

    Raises:
        RecipeError: a parameter whose name or type a model cannot use: the author of the part has to change it.
    """
    hints = get_type_hints(part.__init__, include_extras=True)
    found = []
    for parameter in inspect.signature(part).parameters.values():
        where = f"{part.__module__}.{part.__name__}: argument {parameter.name!r}"
        if hints.get(parameter.name, Any) is Any:
            raise RecipeError(f"{where} must have a type that says what a recipe may give")
        if hasattr(PartSpec, parameter.name) or parameter.name == "type" or parameter.name.startswith(("_", "model_")):
            raise RecipeError(f"{where} has a name that recipes use themselves; choose another")
        found.append((parameter, hints[parameter.name]))
    return found


def to_plain(value: Any) -> Any:
    """`value` as plain data; whole numbers stay keys of mappings."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    return to_jsonable_python(value)


def _required(model: type[PartSpec]) -> bool:
    return any(field.is_required() for key, field in model.model_fields.items() if key != "type")


def _bounded(annotation: Any) -> Any:
    """A bare `int` gets limits: a recipe with a number of thirty digits is a mistake."""
    return Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)] if annotation is int else annotation
