"""tokenprune: faster vision-language models by dropping, merging or recycling vision tokens. See docs/index.md.

What a user needs, and what the author of a part needs, is here: one import line, ``import tokenprune as tp``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.answers import Answer as Answer
    from tokenprune.answers import ask as ask
    from tokenprune.answers import load as load
    from tokenprune.budget import Budget as Budget
    from tokenprune.builder import build as build
    from tokenprune.core.attention import attention_from_qk as attention_from_qk
    from tokenprune.core.clip import Clip as Clip
    from tokenprune.core.clip import open_video as open_video
    from tokenprune.core.groups import Groups as Groups
    from tokenprune.core.merge import Merge as Merge
    from tokenprune.core.merge import merge as merge
    from tokenprune.core.merge import unmerge as unmerge
    from tokenprune.core.needs import Needs as Needs
    from tokenprune.core.place import Place as Place
    from tokenprune.core.report import Report as Report
    from tokenprune.core.tokens import Attention as Attention
    from tokenprune.core.tokens import Tokens as Tokens
    from tokenprune.engine.attach import Attached as Attached
    from tokenprune.engine.attach import attach as attach
    from tokenprune.engine.attach_vision import attach_vision as attach_vision
    from tokenprune.engine.encode import Encoded as Encoded
    from tokenprune.engine.encode import encode as encode
    from tokenprune.errors import BudgetError as BudgetError
    from tokenprune.errors import InputError as InputError
    from tokenprune.errors import NotFiredError as NotFiredError
    from tokenprune.errors import RecipeError as RecipeError
    from tokenprune.errors import TokenPruneError as TokenPruneError
    from tokenprune.errors import UnsupportedModelError as UnsupportedModelError
    from tokenprune.families.adapter import Adapter as Adapter
    from tokenprune.families.adapter import VisionRow as VisionRow
    from tokenprune.families.ledger import ledger as ledger
    from tokenprune.fitting import fit as fit
    from tokenprune.parts.groupers.base import Grouper as Grouper
    from tokenprune.parts.part import Part as Part
    from tokenprune.parts.raters.base import RaterSelector as RaterSelector
    from tokenprune.parts.rectifiers.base import Rectifier as Rectifier
    from tokenprune.parts.recyclers.base import Recycler as Recycler
    from tokenprune.parts.samplers.base import Sampler as Sampler
    from tokenprune.parts.schedulers.base import Scheduler as Scheduler
    from tokenprune.parts.schedulers.base import StaticScheduler as StaticScheduler
    from tokenprune.parts.scorers.base import Scorer as Scorer
    from tokenprune.parts.work import Work as Work
    from tokenprune.parts.work import no_products as no_products
    from tokenprune.pipeline import Pipeline as Pipeline
    from tokenprune.plot.kept import plot_kept as plot_kept
    from tokenprune.recipe import Recipe as Recipe
    from tokenprune.recipe import list_recipes as list_recipes
    from tokenprune.recipe import load_recipe as load_recipe
    from tokenprune.registry import part as part
    from tokenprune.scenes.cases import scene_cases as scene_cases
    from tokenprune.serving import PictureReducer as PictureReducer
    from tokenprune.stage import Stage as Stage
    from tokenprune.study.audit import audit as audit
    from tokenprune.study.bench import bench as bench
    from tokenprune.study.cases import Case as Case
    from tokenprune.study.evaluate import evaluate as evaluate
    from tokenprune.study.evaluate import make_conditions as make_conditions
    from tokenprune.study.tune import make_space as make_space
    from tokenprune.study.tune import tune as tune

_HOMES = {
    "Adapter": "families.adapter",
    "Answer": "answers",
    "Attached": "engine.attach",
    "Attention": "core.tokens",
    "Budget": "budget",
    "BudgetError": "errors",
    "Case": "study.cases",
    "Clip": "core.clip",
    "Encoded": "engine.encode",
    "Grouper": "parts.groupers.base",
    "Groups": "core.groups",
    "InputError": "errors",
    "Merge": "core.merge",
    "Needs": "core.needs",
    "NotFiredError": "errors",
    "Part": "parts.part",
    "PictureReducer": "serving",
    "Pipeline": "pipeline",
    "Place": "core.place",
    "RaterSelector": "parts.raters.base",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "Rectifier": "parts.rectifiers.base",
    "Recycler": "parts.recyclers.base",
    "Report": "core.report",
    "Sampler": "parts.samplers.base",
    "Scheduler": "parts.schedulers.base",
    "Scorer": "parts.scorers.base",
    "Stage": "stage",
    "StaticScheduler": "parts.schedulers.base",
    "TokenPruneError": "errors",
    "Tokens": "core.tokens",
    "UnsupportedModelError": "errors",
    "VisionRow": "families.adapter",
    "Work": "parts.work",
    "ask": "answers",
    "attach": "engine.attach",
    "attach_vision": "engine.attach_vision",
    "attention_from_qk": "core.attention",
    "audit": "study.audit",
    "bench": "study.bench",
    "build": "builder",
    "encode": "engine.encode",
    "evaluate": "study.evaluate",
    "fit": "fitting",
    "ledger": "families.ledger",
    "list_recipes": "recipe",
    "load": "answers",
    "load_recipe": "recipe",
    "make_conditions": "study.evaluate",
    "make_space": "study.tune",
    "merge": "core.merge",
    "no_products": "parts.work",
    "open_video": "core.clip",
    "part": "registry",
    "plot_kept": "plot.kept",
    "scene_cases": "scenes.cases",
    "tune": "study.tune",
    "unmerge": "core.merge",
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
