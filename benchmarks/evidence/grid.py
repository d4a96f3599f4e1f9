"""The conditions of the experiment, as recipes; fixed in plan.md before the first run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.budget import Budget
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.evaluate import Condition, make_conditions

SCENES = 150
GRID_TASKS = ("localisation", "existence", "counting", "code", "ground")
AUDITED = 150
LAYERS = (1, 2, 4, 6)
EARLY = (1, 2)
COUNTS = (108, 72, 36, 14)
MAIN_COUNT = 36
AVERAGES = (72, 48, 29)
DRAWS = 3
WHOLE = (
    "fastv",
    "feather",
    "pyramiddrop",
    "pyramiddrop-code",
    "pyramiddrop:feather",
    "sparsevlm",
    "sparsevlm-v1.5",
    "sparsevlm-plus",
)

ATTENTION: dict[str, Any] = {"type": "attention"}
ATTENTION_VISION = {"type": "attention", "normalise": "vision"}
NO_ROPE = {"type": "attention", "normalise": "vision", "rope": False}


def criteria(count: int) -> dict[str, dict[str, Any]]:
    """Parts of each criterion's stage when `count` tokens are kept."""
    grid = {"type": "union", "stride": 3 if count >= 16 else 4, "offset": 0}
    last_text = {"raters": "last_text"}
    return {
        "attention": last_text | {"scorer": ATTENTION, "sampler": "top_k"},
        "attention-vision": last_text | {"scorer": ATTENTION_VISION, "sampler": "top_k"},
        "no-rope": last_text | {"scorer": NO_ROPE, "sampler": "top_k"},
        "attention-vision+grid": last_text | {"scorer": ATTENTION_VISION, "sampler": grid},
        "no-rope+grid": last_text | {"scorer": NO_ROPE, "sampler": grid},
        "density-peaks": {"scorer": "density_peaks", "sampler": "top_k"},
        "uniform": {"sampler": "uniform"},
        "random": {"scorer": {"type": "random", "seed": 0}, "sampler": "top_k"},
        "last": {"scorer": "raster", "sampler": "top_k"},
    }


def one_stage(criterion: str, layer: int, count: int, *, positions: str = "original") -> Recipe:
    """A recipe with one stage before `layer`; its name is criterion.layer."""
    stage = {"name": "prune", "place": {"before_layer": layer}, "scheduler": "solved", "positions": positions}
    name = f"{criterion}.{layer}" + ("" if positions == "original" else f".{positions}")
    recipe = {"version": 1, "name": name, "stages": [stage | criteria(count)[criterion]], "budget": {"keep": count}}
    return load_recipe(recipe)


def grid(counts: Sequence[int] = COUNTS) -> list[Condition]:
    """One stage: every criterion at every layer and count."""
    made: list[Condition] = []
    for count in counts:
        recipes = [one_stage(name, layer, count) for layer in LAYERS for name in criteria(count)]
        if count == MAIN_COUNT:
            recipes.append(one_stage("no-rope", 2, count, positions="renumber"))
        made += make_conditions(recipes, [Budget("keep", count)], draws=DRAWS, baselines=False)
    return [made[0], *(condition for condition in made if condition.kind != "untouched")]


def whole_recipes() -> list[Condition]:
    """Published recipes, and SparseVLM with one part changed, at equal averages; baselines beside them."""
    recipes: list[Recipe | str] = [*WHOLE, *sparsevlm_without()]
    return make_conditions(recipes, [Budget("keep", count) for count in AVERAGES], draws=DRAWS)


def sparsevlm_without() -> list[Recipe]:
    """SparseVLM with all text as raters, and with nothing recycled."""
    made = []
    for name, part in (("all-text", {"raters": "all_text"}), ("no-recycling", {"recycler": "drop"})):
        recipe = load_recipe("sparsevlm").to_dict()
        stages = [stage | part for stage in recipe["stages"]]
        made.append(load_recipe(recipe | {"name": f"sparsevlm.{name}", "stages": stages}))
    return made


def adaptive(count: int | None) -> list[Condition]:
    """SparseVLM as its rank says, or with the fixed budget of `count` tokens on average over all layers."""
    budgets = [] if count is None else [Budget("average", count)]
    return make_conditions(["sparsevlm"], budgets, draws=1, baselines=False)
