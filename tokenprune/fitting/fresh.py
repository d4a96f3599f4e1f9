"""Stages with learned parts that have learned nothing yet: where a fit begins, and a test of structure."""

from __future__ import annotations

from tokenprune.parts.learned import Host, Learned
from tokenprune.recipe import Recipe
from tokenprune.stage import Stage


def without_weights(recipe: Recipe) -> Recipe:
    """The same recipe, naming no weights: what a fit makes weights for, whatever those that it names now."""
    stages = []
    for stage in recipe.stages:
        learned = {role: part for role, part in stage.parts.items() if issubclass(part.part, Learned)}
        blank = {role: part.model_copy(update={"weights": None}) for role, part in learned.items()}
        stages.append(stage.model_copy(update=blank))
    again = None if recipe.again is None else recipe.again.model_copy(update={"weights": None})
    return recipe.model_copy(update={"stages": tuple(stages), "again": again})


def fresh_stages(recipe: Recipe, host: Host, *, seed: int = 0) -> list[Stage]:
    """The stages of a recipe with new parameters in every learned part, whatever weights the recipe names.

    Args:
        recipe: whose stages.
        host: the model that they are for.
        seed: of the parameters; those of two parts differ.
    """
    stages = [spec.build() for spec in without_weights(recipe).stages]
    for number, stage in enumerate(stages):
        learned = [part for part in stage.parts if isinstance(part, Learned)]
        for index, part in enumerate(learned):
            part.start(host, seed=seed + 100 * number + index)
    return stages
