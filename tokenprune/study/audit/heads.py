"""How much the attention that a recipe scores by follows position, in every layer and head of the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tokenprune.builder import build
from tokenprune.core.place import Place
from tokenprune.core.report import Report
from tokenprune.core.tokens import Count, Tokens
from tokenprune.engine.engine import Engine
from tokenprune.families.anatomy import anatomy
from tokenprune.parts.part import Part
from tokenprune.parts.raters.base import RaterSelector
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe
from tokenprune.stage import Stage, StageResult
from tokenprune.study.statistics import Array, Estimate, over_pictures, rank_correlation


@dataclass(frozen=True, eq=False)
class CriterionAudit:
    """One way to score by attention, asked in every decoder layer of the untouched model.

    Numbers are Spearman's rank correlations of score and raster index, mean over pictures: 1 when later tokens always
    get more attention.
    """

    stages: tuple[str, ...]
    """Names of the recipe's stages that score so, each at a layer of its own."""
    raters: str
    scorer: str
    layers: tuple[Estimate | None, ...]
    """Of the score, layer by layer; None where it never told two tokens apart."""
    heads: Array
    """``[layers, heads]`` of each head's attention alone; NaN where it never told two tokens apart."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "stages": list(self.stages),
            "raters": self.raters,
            "scorer": self.scorer,
            "layers": [None if each is None else each.to_dict() for each in self.layers],
            "heads": [[None if np.isnan(each) else round(each, 6) for each in row] for row in self.heads.tolist()],
        }


class HeadAudit:
    """Listens to the untouched model with the raters and the attention scorers of a recipe.

        heads = HeadAudit(model, recipe)
        with heads.listening():
            model(**inputs)
        print(heads.criteria[0].heads)

    Stages that differ only in their place, and in whose attention they read, are one criterion. A recipe that does not
    score by attention has none, and nothing is listened to then.

    Args:
        model: a supported model with nothing attached.
        recipe: whose criteria.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self._anatomy = anatomy(model)
        self._ears: list[_Ear] = []
        for stage in build(recipe, depth=len(self._anatomy.layers)):
            if type(stage.scorer) is not AttentionScorer or stage.raters is None:
                continue
            scorer = AttentionScorer(**{**stage.scorer.settings(), "layer": "next"})
            ear = _Ear(stage.raters, scorer, len(self._anatomy.layers))
            known = next((other for other in self._ears if other.words == ear.words), None)
            if known is None:
                self._ears.append(ear)
                known = ear
            known.stages.append(stage.name)

    def __bool__(self) -> bool:
        """Whether the recipe scores by attention at all."""
        return bool(self._ears)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block every forward of the model that brings pictures is heard; its results stay as they are."""
        stages = [stage for layer in range(len(self._anatomy.layers)) for stage in self._at(layer)]
        if not stages:
            yield
            return
        pipeline = Pipeline(stages, depth=len(self._anatomy.layers), name="listening")
        pipeline.to(next(self._anatomy.text.parameters()).device)
        engine = Engine(self._anatomy, pipeline, Report("listening", "", len(self._anatomy.layers), len(stages)))
        engine.mount()
        try:
            yield
        finally:
            engine.unmount()

    def _at(self, layer: int) -> list[Stage]:
        return [_Listening(ear.raters, ear.scorer, layer, ear.hear(layer)) for ear in self._ears]

    @property
    def criteria(self) -> tuple[CriterionAudit, ...]:
        """One entry for each criterion, in the order of the recipe; empty as long as nothing was heard."""
        return tuple(ear.result() for ear in self._ears if ear.scores[0])


class _Listening(Stage):
    """Keeps every token, and passes on what each head thinks of it."""

    def __init__(
        self,
        raters: RaterSelector,
        scorer: AttentionScorer,
        layer: int,
        heard: Callable[[Tensor, Tensor, Tokens], None],
    ) -> None:
        super().__init__(
            place=Place("before_layer", layer),
            scheduler=FixedScheduler(keep=1.0),
            scorer=scorer,
            sampler=TopKSampler(),
            recycler=DropRecycler(),
            raters=raters,
            name=f"layer {layer}",
        )
        self._heard = heard

    # Never given pictures apart.
    def forward(  # type: ignore[override]
        self, tokens: Tokens, count: Count | None = None, weights: Tensor | None = None
    ) -> StageResult:
        scorer = self.scorer
        assert isinstance(scorer, AttentionScorer) and self.raters is not None  # as given to __init__
        assert tokens.attention is not None  # the engine brings it to every layer
        weights = self.raters(tokens) if weights is None else weights
        heads = tokens.attention.scores(
            weights, rope=scorer.rope, normalise=scorer.normalise, layer="next", gravity=scorer.gravity
        )
        self._heard(scorer(tokens, weights), heads, tokens)
        return StageResult(tokens, tokens.origin[:, :0], None, False, None, weights)


class _Ear:
    """What was heard of one criterion: by layer, a number and one for each head of every picture."""

    def __init__(self, raters: RaterSelector, scorer: AttentionScorer, depth: int) -> None:
        self.raters, self.scorer = raters, scorer
        self.stages: list[str] = []
        self.scores: list[list[float]] = [[] for _ in range(depth)]
        self.heads: list[list[list[float]]] = [[] for _ in range(depth)]

    @property
    def words(self) -> tuple[str, str]:
        return _words(self.raters), _words(self.scorer)

    def hear(self, layer: int) -> Callable[[Tensor, Tensor, Tokens], None]:
        def heard(scores: Tensor, heads: Tensor, tokens: Tokens) -> None:
            numbers = (x.detach().double().cpu().numpy() for x in (scores, heads))
            for score, each, size in zip(*numbers, tokens.sizes, strict=True):
                index = np.arange(size, dtype=np.float64)  # nothing is gone, so a token stands at its raster index
                found = [rank_correlation(row[:size], index) for row in (score, *each)]
                own, *others = [float("nan") if value is None else value for value in found]
                self.scores[layer].append(own)
                self.heads[layer].append(others)

        return heard

    def result(self) -> CriterionAudit:
        known = [[value for value in layer if value == value] for layer in self.scores]  # NaN is unlike itself
        layers = [over_pictures(np.array(each)[:, None], lambda s: s[..., 0]) if each else None for each in known]
        told = np.array(self.heads)
        seen = (~np.isnan(told)).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            heads = np.nansum(told, axis=1) / seen
        return CriterionAudit(tuple(self.stages), *self.words, tuple(layers), heads)


def _words(part: Part) -> str:
    """Its name and settings, but for the layer: all are asked."""
    settings = (f"{key}={value}" for key, value in part.settings().items() if key != "layer")
    return f"{part.name()}({', '.join(settings)})"
