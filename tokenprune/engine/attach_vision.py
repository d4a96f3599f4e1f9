"""`attach_vision`: put a recipe on a plain vision transformer, without a language model, and take it off again."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from tokenprune.core.stage_report import StageReport
from tokenprune.engine.traces import pre_hook
from tokenprune.engine.vision_run import Run, run_of
from tokenprune.engine.vision_stages import VisionStages, stages_inside
from tokenprune.errors import NotFiredError, UnsupportedModelError
from tokenprune.families.tower import find_tower
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe, load_recipe


class _Threads(threading.local):
    """The last run of each thread."""

    run: Run | None = None


class AttachedVision:
    """A recipe on a vision transformer, until `detach` or the end of its ``with`` block. Made by `attach_vision`."""

    def __init__(self, model: nn.Module, name: str, stages: Pipeline) -> None:
        self.tower = find_tower(model, asker="attach_vision")
        """Where its blocks are."""
        outside = [stage for stage in stages if stage.place.kind != "in_vision"]
        if outside:
            raise UnsupportedModelError(
                f"attach_vision: {outside[0].name} ({outside[0].place}): there is no language model; "
                "expected {in_vision: {block: ...}}"
            )
        self.recipe = name
        self._model = model
        self._threads = _Threads()
        self._stages = VisionStages(
            self.tower, stages_inside(stages.stages), lambda: self._run, lambda rows, grid: rows, stages.picture_plan
        )
        self._handles = [pre_hook(model, self._begin), *self._stages.mount()]

    @property
    def _run(self) -> Run | None:
        return self._threads.run

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """What each stage did in the last forward, in order; samples are pictures.

        Raises:
            NotFiredError: no forward has run.
        """
        if self._run is None or self._run.reduction is None:
            raise NotFiredError(f"recipe {self.recipe!r} is attached, but no picture has come through")
        return tuple(self._run.reduction.report)

    def detach(self) -> None:
        """Take the recipe off: the model is as it was. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> AttachedVision:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._threads.run = run_of(model, args, kwargs)


def attach_vision(model: nn.Module, recipe: str | Path | Mapping[str, Any] | Recipe | Pipeline) -> AttachedVision:
    """Attach a recipe to a vision transformer: every stage stands inside it, ``place: {in_vision: {block: 6}}``.

    Its output has the untouched shape. A dropped patch keeps the state that it had, a merged one gets what its target
    has become, so classifiers and dense heads read it as before.

        with tp.attach_vision(vit, recipe) as attached:
            logits = vit(pixels).logits
        attached.stages[0].kept

    Args:
        model: of transformers or your own: blocks in an `nn.ModuleList`, whose attention has projections ``q_proj`` and
            ``k_proj``, ``query`` and ``key``, or ``qkv``; hidden states ``[B, n, D]`` enter a block first.
        recipe: a recipe's name, path, dict or `Recipe`; or a `Pipeline` of stages made in Python.

    Raises:
        RecipeError: the recipe is not valid.
        UnsupportedModelError: no such blocks, a stage outside them, or a budget.
    """
    if isinstance(recipe, Pipeline):
        stages, name = recipe, recipe.name
    else:
        loaded = load_recipe(recipe)
        stages, name = Pipeline(loaded.build_stages(), budget=loaded.budget, name=loaded.name), loaded.name
    if stages.budget is not None:
        raise UnsupportedModelError(
            f"attach_vision: {name} has a budget, which counts decoder layers; let its schedulers say how many to keep"
        )
    stages.to(next(model.parameters()).device)
    return AttachedVision(model, name, stages)
