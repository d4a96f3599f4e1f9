"""What is compared: recipes at a budget, the baselines beside them, a smaller image, and the untouched model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.budget import Budget
from tokenprune.errors import InputError
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.recipe.text.problems import InvalidRecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

BASELINES = ("random", "uniform", "last")
SMALLER = "smaller-image"
Kind = Literal["untouched", "recipe", "smaller-image"]


@dataclass(frozen=True)
class Condition:
    """One way to run the model over all cases. Conditions with one `label` and budget are draws of the same thing."""

    label: str
    kind: Kind = "recipe"
    recipe: Recipe | None = None
    budget: Budget | None = None
    seed: int = 0
    baseline: bool = False

    @property
    def group(self) -> tuple[str, str]:
        """What its results are pooled by."""
        return self.label, "" if self.budget is None else str(self.budget)

    @property
    def fingerprint(self) -> str:
        """What it does to the model or to the picture."""
        if self.recipe is not None:
            return self.recipe.fingerprint
        return self.kind if self.budget is None else f"{self.kind} {self.budget.value!r}"


UNTOUCHED = Condition("untouched", kind="untouched")


def make_conditions(
    recipes: Iterable[Recipe | str],
    budgets: Sequence[Budget] = (),
    *,
    draws: int = 5,
    baselines: bool = True,
    sets: Sequence[str] = (),
) -> list[Condition]:
    """The untouched model, then for each budget every recipe, the baselines, and a smaller image.

    Args:
        recipes: names, paths or recipes; ``name:variant`` takes a published variant.
        budgets: each applies to all conditions alike; without one, each recipe runs with its own counts, alone.
        draws: seeds 0 … of every recipe that draws at random. Even layouts (the sampler ``uniform`` without a stride)
            run in all their phases, unless `draws` is 1; others run once.
        baselines: put `random`, `uniform`, `last` and a smaller image beside the recipes. Needs a budget.
        sets: overrides ``PATH=VALUE`` of the recipes, not of the baselines put beside them.

    Raises:
        RecipeError: a recipe is not valid.
        InputError: fewer than one draw, the same thing twice, or nothing to run.
    """
    if draws < 1:
        raise InputError(f"seeds: expected at least 1, got {draws}")
    given = [_read(recipe, sets, next(iter(budgets), None)) for recipe in recipes]
    made = [UNTOUCHED]
    for budget in budgets or (None,):
        for label, recipe in given:
            made += _draws(label, recipe, budget, draws, baseline=label in BASELINES)
        if budget is not None and baselines:
            labels = {label for label, _ in given}
            for name in BASELINES:
                if name not in labels:
                    made += _draws(name, load_recipe(name), budget, draws, baseline=True)
            made.append(Condition(SMALLER, kind="smaller-image", budget=budget, baseline=True))
    twice = {c.label for i, c in enumerate(made) if any((c.group, c.seed) == (o.group, o.seed) for o in made[:i])}
    if twice:
        raise InputError(f"asked for twice: {', '.join(sorted(twice))}")
    if len(made) == 1:
        raise InputError("nothing to compare: give a recipe, or a budget for the baselines")
    return made


def _read(source: Recipe | str, sets: Sequence[str], budget: Budget | None) -> tuple[str, Recipe]:
    """How tables call a recipe, and the recipe with the overrides applied.

    `budget` is any of those that follow: a recipe may leave its counts to one, and is not valid without.
    """
    label, variant = (source.name if isinstance(source, Recipe) else source), None
    if isinstance(source, str):
        name, colon, last = source.rpartition(":")
        if colon and name and "/" not in last and "\\" not in last:
            source, variant = name, last
    try:
        recipe = load_recipe(source, variant=variant, sets=sets, **_value(budget))
    except InvalidRecipeError as error:  # overrides go to several recipes: say which one they do not fit
        told = (replace(each, path=f"{label} --set") if each.path == "--set" else each for each in error.problems)
        raise InvalidRecipeError(told) from None
    return label if variant else recipe.name, recipe


def _draws(label: str, recipe: Recipe, budget: Budget | None, draws: int, *, baseline: bool) -> list[Condition]:
    """The recipe at the budget, once for each run of its parts that differs by chance alone (`Part.draws`)."""
    drawn = {
        f"stages.{number}.{role}.{part.draws.setting}": part.draws.most
        for number, stage in enumerate(recipe.stages)
        for role, spec in stage.parts.items()
        if (part := spec.build()).draws is not None
    }
    # A seed has any number of values; of settings with fewer, all are run.
    most = [draws if values is None else values for values in drawn.values()]
    runs = 1 if draws == 1 else draws if None in drawn.values() else max(most, default=1)
    made = []
    for run in range(runs):
        sets = [f"{path}={run if values is None else run % values}" for path, values in drawn.items()]
        one = load_recipe(recipe, sets=sets if runs > 1 else (), **_value(budget))
        made.append(Condition(label, recipe=one, budget=budget, seed=run, baseline=baseline))
    return made


def _value(budget: Budget | None) -> dict[str, Any]:
    """The budget as an argument of `load_recipe`."""
    return {} if budget is None else {budget.kind: budget.value}


def shrink(picture: Image, share: float) -> tuple[Image, float]:
    """`picture` with at most `share` of its pixels, and the share that it has.

    Sides are rounded down, so the share is never exceeded (but a side is at least one pixel).
    """
    from PIL.Image import Resampling

    side = share**0.5
    width, height = max(1, int(picture.width * side + 1e-9)), max(1, int(picture.height * side + 1e-9))
    small = picture.resize((width, height), Resampling.BICUBIC) if share < 1 else picture
    return small, width * height / (picture.width * picture.height)


def share_of(budget: Budget, total: int) -> float:
    """Share of `total` vision tokens that a budget in tokens stands for."""
    return budget.value if budget.is_share else min(1.0, budget.value / max(total, 1))
