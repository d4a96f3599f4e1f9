"""tokenprune: faster vision-language models by dropping, merging or recycling vision tokens. See docs/index.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.budget import Budget as Budget
    from tokenprune.builder import build as build
    from tokenprune.core.report import Report as Report
    from tokenprune.core.tokens import Tokens as Tokens
    from tokenprune.engine.attach import Attached as Attached
    from tokenprune.engine.attach import attach as attach
    from tokenprune.families.ledger import ledger as ledger
    from tokenprune.pipeline import Pipeline as Pipeline
    from tokenprune.recipe import Recipe as Recipe
    from tokenprune.recipe import list_recipes as list_recipes
    from tokenprune.recipe import load_recipe as load_recipe
    from tokenprune.stage import Stage as Stage

_HOMES = {
    "Attached": "engine.attach",
    "Budget": "budget",
    "Pipeline": "pipeline",
    "Recipe": "recipe",
    "Report": "core.report",
    "Stage": "stage",
    "Tokens": "core.tokens",
    "attach": "engine.attach",
    "build": "builder",
    "ledger": "families.ledger",
    "list_recipes": "recipe",
    "load_recipe": "recipe",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import tokenprune` needs neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")
    return getattr(import_module(f"tokenprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
