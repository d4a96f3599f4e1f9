"""Recipes: YAML files that say how vision tokens are reduced. Reading, checking, overriding and writing them."""

from __future__ import annotations

from tokenprune.recipe.editor_schema import json_schema
from tokenprune.recipe.files import list_learned_recipes, list_loop_recipes, list_recipes, recipe_path
from tokenprune.recipe.load import load_recipe, parse_recipe
from tokenprune.recipe.part_help import ArgumentHelp, PartHelp, describe_part
from tokenprune.recipe.part_models import PartSpec
from tokenprune.recipe.schema import Recipe, StageSpec
from tokenprune.recipe.text.problems import InvalidRecipeError, Problem, format_problems

__all__ = [
    "ArgumentHelp",
    "InvalidRecipeError",
    "PartHelp",
    "PartSpec",
    "Problem",
    "Recipe",
    "StageSpec",
    "describe_part",
    "format_problems",
    "json_schema",
    "list_learned_recipes",
    "list_loop_recipes",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_path",
]
