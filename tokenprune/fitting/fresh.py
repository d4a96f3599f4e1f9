"""Stages with learned parts that have learned nothing yet: where a fit begins, and a test of structure."""

from __future__ import annotations

from tokenprune.parts.learned import Host, Learned
from tokenprune.recipe import Recipe
from tokenprune.stage import Stage


def fresh_stages(recipe: Recipe, host: Host, *, seed: int = 0) -> list[Stage]:
    """The stages of a recipe with new parameters in every learned part, whatever weights the recipe names.

    Args:
        recipe: whose stages.
        host: the model that they are for.
        seed: of the parameters; those of two parts differ.
    """
    stages = []
    for number, spec in enumerate(recipe.stages):
        learned = {role: part for role, part in spec.parts.items() if issubclass(part.part, Learned)}
        blank = {role: part.model_copy(update={"weights": None}) for role, part in learned.items()}
        stage = spec.model_copy(update=blank).build()
        for index, role in enumerate(learned):
            part = getattr(stage, role)
            part.start(host, seed=seed + 100 * number + index)
        stages.append(stage)
    return stages
