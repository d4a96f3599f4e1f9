"""`load_recipe`: from a name, a file, a text or a dict to a valid `Recipe`, or to everything that is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from tokenprune.budget import Budget, BudgetKind
from tokenprune.errors import BudgetError, did_you_mean
from tokenprune.recipe.files import Draft, find, load_file, load_text, over_base
from tokenprune.recipe.locate import explain
from tokenprune.recipe.merge import expand
from tokenprune.recipe.overrides import apply, apply_set
from tokenprune.recipe.schema import Recipe
from tokenprune.recipe.text.node import Node, Source, Spot, from_data
from tokenprune.recipe.text.problems import InvalidRecipeError, Problem, in_order
from tokenprune.recipe.text.yaml_reader import text_source

Given = int | float | None


def load_recipe(
    source: str | Path | Mapping[str, object] | Recipe,
    *,
    variant: str | None = None,
    sets: Sequence[str] = (),
    keep: Given = None,
    average: Given = None,
    final: Given = None,
    flops: float | None = None,
) -> Recipe:
    """A recipe, complete and valid.

    The variant is applied first, then `sets` in order, then the budget. What is chosen by a variant or by `sets` is
    resolved: the recipe that comes back has no variants any more.

    Args:
        source: the name of a recipe that comes with tokenprune, the path of a file, a dict, or a recipe to change.
        variant: one of the recipe's own named sets of overrides.
        sets: overrides ``PATH=VALUE`` such as ``stages.0.recycler.share=0.2``; the value is YAML.
        keep: budget: average over the layers from the first place on. A float in (0, 1] is a share of the sample's
            original vision tokens, an int is a count; so also `average` and `final`. Replaces the recipe's budget.
        average: budget: average over all layers.
        final: budget: tokens after the last stage.
        flops: budget: a share in (0, 1] of the multiply-adds of the untouched prefill, the recipe's own included.

    Raises:
        RecipeError: everything wrong with the recipe, each with its place; the list is `InvalidRecipeError.problems`.
        BudgetError: more than one budget, or one out of range.
    """
    budget = _budget(keep=keep, average=average, final=final, flops=flops)
    layer, name, folder = _read(source)
    return _finish(layer, name, variant, sets, budget).in_folder(folder)


def parse_recipe(text: str, *, path: str = "<text>") -> Recipe:
    """A recipe from YAML text; `path` is what messages call it. It may extend recipes that come with tokenprune.

    Raises:
        RecipeError: everything wrong with the recipe, each with its place.
    """
    return _finish(load_text(text, text_source(path, text)), "recipe", None, (), None)


def _read(source: str | Path | Mapping[str, object] | Recipe) -> tuple[Draft, str, Path | None]:
    """The layers of a source folded into one, what the recipe is called if it does not say so, and its folder."""
    folder = source.folder if isinstance(source, Recipe) else None
    if isinstance(source, Recipe):
        source = source.to_dict()
    if isinstance(source, Mapping):
        root, problems = from_data(source, Source("<dict>"))
        return over_base(root, problems), "recipe", folder
    if not isinstance(source, str | Path):
        raise TypeError(f"a recipe is a name, a path, a mapping or a Recipe, got {type(source).__name__}")
    path = find(source)
    return load_file(path, str(path)), _name_from(path), path.absolute().parent


def _finish(layer: Draft, name: str, variant: str | None, sets: Sequence[str], budget: Budget | None) -> Recipe:
    """The recipe of a layer with everything applied to it that a call asks for."""
    problems = list(layer.problems)
    if layer.root is None:
        raise InvalidRecipeError(in_order(problems))
    base = root = layer.root
    if variant is not None:
        root, found = _choose(root, variant)
        problems += found
    for expression in sets:
        root, found = apply_set(root, expression)
        root = expand(root)
        problems += found
    if budget is not None:
        root = _with_budget(root, budget)
    if variant is not None or sets:
        root = _without_variants(root)
    recipe, found = validate(_named(root, name))
    problems = _join(problems, found)
    if not problems:
        # A variant that does not work is a mistake in the file, whether it is asked for or not.
        problems = _check_variants(base, name, budget)
    if problems or recipe is None:
        raise InvalidRecipeError(in_order(problems))
    return recipe


def validate(root: Node) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that a complete tree describes, or what is wrong with it."""
    try:
        # As JSON, because there a list may stand for a tuple even when everything else is strict.
        return Recipe.model_validate_json(json.dumps(root.plain())), []
    except ValidationError as error:
        return None, explain(error, root)


def _join(first: list[Problem], second: list[Problem]) -> list[Problem]:
    """Problems of two passes; where both complain about one thing, the earlier pass knows better."""

    def thing(problem: Problem) -> tuple[object, ...]:
        # In a dict, which has no lines, the message starts with the path of the value.
        where = problem.message.partition(": ")[0] if problem.line is None else (problem.line, problem.column)
        return problem.path, where

    known = {thing(problem) for problem in first}
    return first + [problem for problem in second if thing(problem) not in known]


def _choose(root: Node, variant: str) -> tuple[Node, list[Problem]]:
    known = root.mapping["variants"].mapping if "variants" in root.mapping else {}
    if variant not in known:
        message = f"no variant {variant!r}{did_you_mean(variant, known)}; known: {', '.join(known) or 'none'}"
        return root, [Spot(text_source("--variant", variant), 1, 1).problem(message)]
    return _apply_variant(root, known[variant])


def _apply_variant(root: Node, overrides: Node) -> tuple[Node, list[Problem]]:
    problems: list[Problem] = []
    for path, value in overrides.mapping.items():
        root, found = apply(root, path, value, value.key or value.at)
        root = expand(root)
        problems += found
    return root, problems


def _check_variants(base: Node, name: str, budget: Budget | None) -> list[Problem]:
    problems: list[Problem] = []
    variants = base.mapping["variants"].mapping if "variants" in base.mapping else {}
    for variant, overrides in variants.items():
        root, found = _apply_variant(base, overrides)
        root = root if budget is None else _with_budget(root, budget)
        found = found or validate(_named(_without_variants(root), name))[1]
        problems += [replace(problem, message=f"variant {variant!r}: {problem.message}") for problem in found]
    return problems


def _without_variants(root: Node) -> Node:
    return replace(root, value={key: node for key, node in root.mapping.items() if key != "variants"})


def _with_budget(root: Node, budget: Budget) -> Node:
    spot = Spot(Source(f"--{budget.kind}"))
    return root.with_entries(budget=Node({budget.kind: Node(budget.value, spot, spot)}, spot, spot))


def _named(root: Node, name: str) -> Node:
    """The recipe with names where none was given: its own, and ``stage_0``, ``stage_1``, …"""
    if "name" not in root.mapping:
        root = root.with_entries(name=Node(name, root.at, root.at))
    stages = root.mapping.get("stages")
    if stages is None or not isinstance(stages.value, list):
        return root
    named = []
    for index, stage in enumerate(stages.value):
        if isinstance(stage.value, dict) and "name" not in stage.value:
            stage = stage.with_entries(name=Node(f"stage_{index}", stage.at, stage.at))
        named.append(stage)
    return root.with_entries(stages=replace(stages, value=named))


def _name_from(path: Path) -> str:
    """What a recipe is called that does not say so: the file's name without its ending."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", path.stem, flags=re.ASCII).lstrip("._+-")[:80] or "recipe"


def _budget(**given: Given) -> Budget | None:
    kinds = {kind: value for kind, value in given.items() if value is not None}
    if len(kinds) > 1:
        raise BudgetError(f"one budget at a time: got {', '.join(kinds)}")
    for kind, value in kinds.items():
        return Budget(cast("BudgetKind", kind), value)
    return None
