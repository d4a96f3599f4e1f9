"""The JSON Schema for editors: current, bounded everywhere, and of one mind with the loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema

from tokenprune.recipe import json_schema, list_recipes, load_recipe
from tokenprune.recipe.editor_schema import committed_schema, schema_text
from tokenprune.registry import ROLES, parts


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []:
        yield from nodes(item)


def test_committed_schema_is_current() -> None:
    again = "python -c 'from tokenprune.recipe.editor_schema import *; print(schema_text(), end=\"\")'"
    assert committed_schema() == schema_text(), f"write it again: {again} > tokenprune/recipe/recipe.schema.json"


def test_every_number_has_an_upper_bound() -> None:
    for node in nodes(json_schema()):
        if node.get("type") in ["integer", "number"]:
            assert "maximum" in node or "const" in node, node


def test_every_mapping_is_closed() -> None:
    for node in nodes(json_schema()):
        if node.get("type") == "object" and "properties" in node:
            assert node["additionalProperties"] is False, node


def test_every_reference_leads_somewhere() -> None:
    schema = json_schema()
    used = {node["$ref"].removeprefix("#/$defs/") for node in nodes(schema) if "$ref" in node}
    assert used == set(schema["$defs"])


def test_every_part_is_known_to_it() -> None:
    names = {
        node["properties"]["type"]["const"] for node in nodes(json_schema()) if "type" in node.get("properties", {})
    }
    assert names >= {name for role in ROLES for name in parts(role)}


def test_complete_and_extending_form() -> None:
    full, partial = json_schema()["anyOf"]
    assert full["required"] == ["version"]
    assert partial["required"] == ["version", "extends"]
    assert "extends" not in full["properties"]
    definitions = json_schema()["$defs"]
    assert definitions["StageSpec"]["required"] == ["place"]
    assert "required" not in definitions["StageSpecOverride"]


GOOD: list[dict[str, Any]] = [
    {"version": 1},
    {"version": 1, "extends": "sparsevlm", "stages": [{"name": "early", "scorer": {"rope": False}, "raters": None}]},
    {"version": 1, "budget": {"keep": 3}, "stages": [{"place": {"before_layer": "25%"}, "scorer": "norm"}]},
]
BAD: list[dict[str, Any]] = [
    {},
    {"version": True},
    {"version": 2},
    {"version": 1, "stagse": []},
    {"version": 1, "extends": "sparsevlm", "stagse": []},
    {"version": 1, "stages": [{"scorer": "norm"}]},
    {"version": 1, "stages": [{"place": "after_vision", "scheduler": "fixed"}]},
    {"version": 1, "stages": [{"place": "after_vision", "scheduler": {"type": "fixed", "keep": 10**20}}]},
    {"version": 1, "stages": [{"place": {"before_layer": 10**20}}]},
    {"version": 1, "budget": {"keep": 3, "final": 3}},
    {"version": 1, "budget": {"keep": 1.5}},
]


def test_validators_agree_with_the_loader() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    shipped = [json.loads(json.dumps(load_recipe(name).to_dict())) for name in list_recipes()]
    for recipe in GOOD + shipped:
        validator.validate(recipe)
    for recipe in BAD:
        assert not validator.is_valid(recipe), recipe
