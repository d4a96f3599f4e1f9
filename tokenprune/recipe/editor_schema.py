"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any, cast

from tokenprune.recipe.schema import BUDGETS, Recipe

SCHEMA_ID = "urn:tokenprune:recipe:1"
SCHEMA_FILE = "recipe.schema.json"


def committed_schema() -> str:
    """The text of the JSON Schema that comes with the package: made by `json_schema`, without third-party parts."""
    return (files("tokenprune.recipe") / SCHEMA_FILE).read_text(encoding="utf-8")


def schema_text() -> str:
    """What the committed schema must be: write it there after a part or a field has changed."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file: either complete, or with `extends` and parts of the rest."""
    full = _tidy(Recipe.model_json_schema())
    definitions: dict[str, Any] = full.pop("$defs")
    partial = _partial(full)
    partial["properties"] = {
        "extends": {"description": "A shipped recipe, or a file in the same folder", "type": "string", "minLength": 1},
        **partial["properties"],
    }
    partial["required"] = ["version", "extends"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "tokenprune recipe",
        "anyOf": [full, partial],
        "$defs": {**definitions, **{_part_of(name): _partial(schema) for name, schema in definitions.items()}},
    }


def _tidy(node: Any, *, names: bool = False) -> Any:
    """Without the titles that pydantic makes of names, and without docstrings meant for programmers."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:  # keys are names of settings here, and one may be called title
        return {key: _tidy(value) for key, value in node.items()}
    tidy = {key: _tidy(value, names=key in {"properties", "$defs"}) for key, value in node.items() if key != "title"}
    if node.get("title") in {"Recipe", "StageSpec"}:
        tidy.pop("description", None)
    return tidy


def _part_of(name: str) -> str:
    return f"{name}Override"


def _partial(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a layer over another recipe: nothing is required, and parts need not repeat their type."""

    def loosen(node: Any, *, budget: bool = False) -> Any:
        if isinstance(node, list):
            return [loosen(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: loosen(value, budget=key == "budget") for key, value in node.items()}
        if "$ref" in node:
            node["$ref"] = _part_of(node["$ref"])
        if "properties" in node and not set(node["properties"]) <= {*BUDGETS, "before_layer", "in_vision", "block"}:
            node.pop("required", None)
        if "oneOf" in node:  # without a type, several parts may have the same settings
            node["anyOf"] = node.pop("oneOf")
        return node

    return cast("dict[str, Any]", loosen(copy.deepcopy(schema)))
