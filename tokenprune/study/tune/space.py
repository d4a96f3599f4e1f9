"""`Space`: a recipe and what may be chosen in it, read from options, a mapping or a YAML file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice, product
from pathlib import Path
from typing import Any

from tokenprune.budget import Budget
from tokenprune.errors import InputError, did_you_mean
from tokenprune.recipe import InvalidRecipeError, Recipe, load_recipe
from tokenprune.recipe.files import find, is_path, read_file
from tokenprune.recipe.text.node import Node
from tokenprune.recipe.text.yaml_reader import read_yaml, text_source

KEYS = ("recipe", "choose")
"""What a file of a space holds."""
ENOUGH = 200
"""Combinations that are tried to find one in which a value is valid; with more, a value is called wrong too early."""
_ANY = Budget("keep", 0.5)
"""The budget under which values are checked: some parts ask for one, whichever it is."""

Labels = Mapping[str, str]
"""What was chosen: choice to the label of its value."""


@dataclass(frozen=True)
class Choice:
    """One thing to choose, and what for: label of a value to the overrides ``PATH=VALUE`` that make it so."""

    name: str
    values: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Space:
    """All recipes that `base` becomes by taking one value of each choice."""

    base: Recipe
    choices: tuple[Choice, ...]

    @property
    def size(self) -> int:
        """Combinations, valid or not."""
        return math.prod(len(choice.values) for choice in self.choices)

    def combinations(self) -> Iterator[dict[str, str]]:
        """All of them in order, the last choice changing first."""
        names = [choice.name for choice in self.choices]
        for labels in product(*(choice.values for choice in self.choices)):
            yield dict(zip(names, labels, strict=True))

    def sets(self, labels: Labels) -> list[str]:
        """The overrides that these values stand for."""
        return [each for choice in self.choices if choice.name in labels for each in choice.values[labels[choice.name]]]

    def recipe(self, labels: Labels, budget: Budget) -> Recipe:
        """The recipe of these values at a budget; choices without a value stay as the base has them.

        Raters follow the parts that ask for them: where these values leave raters that nobody asks, they are left out,
        and where somebody asks and there are none, the last text token rates.

        Raises:
            InvalidRecipeError: the values do not go together.
        """
        sets = self.sets(labels)
        stages = dict.fromkeys(".".join(each.split(".")[:2]) for each in sets if each.startswith("stages."))
        first: InvalidRecipeError | None = None
        for repair in product((None, "null", "last_text"), repeat=len(stages)):
            more = [f"{stage}.raters={raters}" for stage, raters in zip(stages, repair, strict=True) if raters]
            try:
                return load_recipe(self.base, sets=[*sets, *more], **{budget.kind: budget.value})  # type: ignore[arg-type]
            except InvalidRecipeError as error:
                first = first or error
        assert first is not None
        raise first


def make_space(
    recipe: str | Path | Mapping[str, object] | Recipe,
    choose: Mapping[str, Sequence[object]],
    *,
    sets: Sequence[str] = (),
    origin: str = "choose",
) -> Space:
    """A space around a recipe, every value of which is valid in some combination.

    Args:
        recipe: a name, a path, a mapping or a recipe.
        choose: dotted path, as `load_recipe` takes it in `sets`, to the values it may have; or any name without a dot
            to mappings of paths to values that are chosen together.
        sets: overrides ``PATH=VALUE`` of the recipe, applied first.
        origin: what messages call the choices.

    Raises:
        RecipeError: the recipe is not valid, or a path or a value is not, whatever the others are.
        InputError: nothing to choose, a value twice, or a budget among the choices.
    """
    if not choose:
        raise InputError(f"{origin}: nothing to choose; give for example stages.0.sampler: [top_k, max_min]")
    choices = tuple(_choice(name, values, origin) for name, values in choose.items())
    space = Space(load_recipe(recipe, sets=sets), choices)
    for choice in choices:
        for label in choice.values:
            _check(space, choice, label, origin)
    return space


def read_choices(expressions: Sequence[str]) -> dict[str, list[object]]:
    """Choices from ``PATH=VALUE,VALUE,...``; values are YAML, so ``{type: attention, rope: false}`` is one, too.

    Raises:
        InputError: no such form, or the same path twice.
        RecipeError: a value is no YAML.
    """
    found: dict[str, list[object]] = {}
    for expression in expressions:
        path, equals, text = expression.partition("=")
        if not equals or not text.strip() or "\n" in path:
            expected = "expected PATH=VALUE,VALUE,... such as stages.0.sampler=top_k,max_min"
            raise InputError(f"--choose: {expected}, got {expression!r}")
        if path.strip() in found:
            raise InputError(f"--choose: {path.strip()} is given twice; put all its values behind one")
        # Blanks in place of the path, so that columns in messages match the expression.
        node, problems = read_yaml(f"{' ' * len(path)}[{text}]", text_source("--choose", expression))
        if problems or node is None:
            raise InvalidRecipeError(problems)
        found[path.strip()] = [each.plain() for each in node.items]
    return found


def read_space(path: Path, *, sets: Sequence[str] = ()) -> Space:
    """The space in a YAML file: `recipe`, a name, a path from the file's folder or a whole recipe; and `choose`.

    Raises:
        RecipeError: the file cannot be read, or its recipe or a choice is not valid.
        InputError: another key, one that is missing, or nothing to choose.
    """
    shown = str(path)
    text, problems = read_file(path, shown)
    node: Node | None = None
    if not problems:
        node, problems = read_yaml(text, text_source(shown, text))
    if problems:
        raise InvalidRecipeError(problems)
    data = None if node is None else node.plain()
    if not isinstance(data, dict) or data.keys() != set(KEYS):
        wrong = [key for key in data if key not in KEYS] if isinstance(data, dict) else []
        told = f"unknown key {wrong[0]!r}{did_you_mean(wrong[0], KEYS)}; " if wrong else ""
        raise InputError(f"{shown}: error: {told}expected a mapping with recipe and choose")
    choose = data["choose"]
    if not isinstance(choose, dict):
        raise InputError(f"{shown}: error: choose: expected a mapping of paths to lists of values")
    recipe: Any = data["recipe"]
    if isinstance(recipe, str):
        recipe = path.parent / recipe if is_path(recipe) else find(recipe)
    return make_space(recipe, choose, sets=sets, origin=f"{shown} choose")


def default_space() -> Space:
    """One stage: its place, and shipped scorers, samplers and recyclers. Parts that a model cannot run are skipped."""
    return read_space(Path(str(files("tokenprune.study.tune") / "space.yaml")))


def _choice(name: str, values: object, origin: str) -> Choice:
    if name.strip().split(".")[0] == "budget":
        raise InputError(f"{origin}: {name}: the budget is the same for all, so that they can be compared")
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{origin}: {name}: expected a list of values, got {values!r}")
    found: dict[str, tuple[str, ...]] = {}
    for value in values:
        if "." in name:
            label = _label(value)
            sets = [f"{name}={json.dumps(value)}"]
        elif isinstance(value, Mapping) and value:
            label = ", ".join(_label(each) for each in value.values())
            sets = [f"{path}={json.dumps(each)}" for path, each in value.items()]
        else:
            raise InputError(
                f"{origin}: {name}: without a dot this is a name, and each value a mapping such as "
                f"{{stages.0.sampler: max_min}}; got {value!r}"
            )
        if label in found:
            raise InputError(f"{origin}: {name}: {label} is given twice")
        found[label] = tuple(sets)
    return Choice(name, found)


def _label(value: object) -> str:
    """A value in few words, as people write it in YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_label(each)}" for key, each in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _check(space: Space, choice: Choice, label: str, origin: str) -> None:
    """Raise unless the value is valid alone, or in one of `ENOUGH` combinations with the other choices."""
    try:
        space.recipe({choice.name: label}, _ANY)
        return
    except InvalidRecipeError as error:
        alone = error
    others = replace(space, choices=tuple(each for each in space.choices if each is not choice))
    for labels in others.combinations() if others.size <= ENOUGH else islice(draw(others, 0), ENOUGH):
        try:
            space.recipe({**labels, choice.name: label}, _ANY)
            return
        except InvalidRecipeError:
            continue
    raise InvalidRecipeError(replace(each, path=each.path.replace("--set", origin)) for each in alone.problems)


def draw(space: Space, seed: int) -> Iterator[dict[str, str]]:
    """Combinations at random, without end."""
    chance = random.Random(seed)
    while True:
        yield {choice.name: chance.choice(list(choice.values)) for choice in space.choices}
