"""`PromptPrices`: what the prefill of one prompt costs at any counts, as the solver of budgets asks it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenprune.budget import Step
from tokenprune.core.grids import Grid
from tokenprune.cost.shape import ModelShape
from tokenprune.cost.stages import stage_costs
from tokenprune.errors import UnstatedCostWarning
from tokenprune.pipeline import Pipeline


@dataclass(frozen=True)
class PromptPrices:
    """Prices of one prompt's prefill on one model: the multiply-adds from the pixels to the first generated token.

    Vision tower, projector, decoder layers on the whole prompt, the recipe's own work, and lm_head for one token: the
    same number as `tokenprune.cost.account.Cost.prefill`.
    """

    shape: ModelShape
    pipeline: Pipeline
    total: int
    """Vision tokens."""
    grids: Sequence[Grid]
    """(T, H, W) of each image."""
    text: int
    """Other tokens of the prompt."""
    question: int
    """Of these, the ones behind the first image, which may rate."""

    @cached_property
    def untouched(self) -> int:
        return self.fixed + self.shape.decoder.layers * self._layer(self.total, self.total)

    @cached_property
    def fixed(self) -> int:
        """Tower, projector and lm_head: stages in the language model cannot save them."""
        vision = self.shape.vision
        tower = vision.tower(self.total, self.grids) + vision.projection(self.total, self.grids)
        return tower + self.shape.decoder.head

    @cached_property
    def _steps(self) -> tuple[Step, ...]:
        return self.pipeline.steps(self.shape.decoder.layers)

    def model(self, sizes: Sequence[int]) -> int:
        """The model alone when `sizes` vision tokens are left behind the stages."""
        cost, size, fed, layer = self.fixed, self.total, self.total, 0
        for stage, step, left in zip(self.pipeline, self._steps, sizes, strict=True):
            cost += (step.layer - layer) * self._layer(size, fed)
            size, fed, layer = size if stage.skips else left, left, step.layer
        return cost + (self.shape.decoder.layers - layer) * self._layer(size, fed)

    def whole(self, counts: Sequence[int]) -> int:
        """The model, and the recipe's own work, when the stages keep `counts`."""
        stages = stage_costs(
            self.shape,
            self.pipeline,
            counts,
            total=self.total,
            grids=self.grids,
            text=self.text,
            question=self.question,
        )
        self._warn(part for stage in stages for part in stage.unstated)
        return self.model([stage.tokens for stage in stages]) + sum(stage.total for stage in stages)

    @cached_property
    def _warned(self) -> set[str]:
        """Parts already warned of: the solver asks for hundreds of plans, and one warning is enough."""
        return set()

    def _warn(self, unstated: Iterable[str]) -> None:
        new = [part for part in dict.fromkeys(unstated) if part not in self._warned]
        if new:
            self._warned.update(new)
            message = (
                f"{self.pipeline.name}: what {', '.join(new)} costs is not stated (Part.multiply_adds), so it is "
                "missing from the budget of multiply-adds"
            )
            warnings.warn(message, UnstatedCostWarning, stacklevel=2)

    def __str__(self) -> str:
        return f"{self.total} vision and {self.text} other tokens"

    def _layer(self, vision: int, fed: int) -> int:
        tokens, decoder = vision + self.text, self.shape.decoder
        through = (fed + self.text) * decoder.feed_forward()
        return tokens * decoder.projections + through + decoder.attention(tokens, tokens)
