"""`PromptPrices`: what the prefill of one prompt costs at any counts, as the solver of budgets asks it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenprune.budget import Step
from tokenprune.core.tokens import Grid
from tokenprune.cost.shape import ModelShape
from tokenprune.cost.stages import stage_costs
from tokenprune.errors import UnstatedCostWarning
from tokenprune.pipeline import Pipeline


@dataclass(frozen=True)
class PromptPrices:
    """From the pixels to the first generated token, in multiply-adds: `tokenprune.cost.account.Cost.prefill`.

    Vision tower, projector, decoder layers on the whole prompt, the recipe's own work, and lm_head for one token.
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
        return self.fixed + self.shape.decoder.layers * self._layer(self.total)

    @cached_property
    def fixed(self) -> int:
        """What no recipe of stages in the language model can save."""
        vision = self.shape.vision
        tower = vision.tower(self.total, self.grids) + vision.projection(self.total, self.grids)
        return tower + self.shape.decoder.head

    @cached_property
    def _steps(self) -> tuple[Step, ...]:
        return self.pipeline.steps(self.shape.decoder.layers)

    def model(self, sizes: Sequence[int]) -> int:
        """The model alone when `sizes` vision tokens are left behind the stages."""
        cost, size, layer = self.fixed, self.total, 0
        for step, left in zip(self._steps, sizes, strict=True):
            cost += (step.layer - layer) * self._layer(size)
            size, layer = left, step.layer
        return cost + (self.shape.decoder.layers - layer) * self._layer(size)

    def whole(self, counts: Sequence[int]) -> int:
        """The model, and the recipe's own work, when the stages keep `counts`."""
        rows = stage_costs(
            self.shape.decoder, self.pipeline, counts, total=self.total, text=self.text, question=self.question
        )
        self._warn([part for row in rows for part in row.unstated])
        return self.model([row.tokens for row in rows]) + sum(row.total for row in rows)

    def _warn(self, unstated: Sequence[str]) -> None:
        if unstated:
            names = ", ".join(dict.fromkeys(unstated))
            message = (
                f"{self.pipeline.name}: what {names} costs is not stated (Part.multiply_adds), so it is missing "
                "from the budget of multiply-adds"
            )
            warnings.warn(message, UnstatedCostWarning, stacklevel=2)

    def __str__(self) -> str:
        return f"{self.total} vision and {self.text} other tokens"

    def _layer(self, vision: int) -> int:
        tokens, decoder = vision + self.text, self.shape.decoder
        return tokens * decoder.linear() + decoder.attention(tokens, tokens)
