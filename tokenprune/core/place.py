"""`Place`: where in the model a stage acts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tokenprune.errors import RecipeError


@dataclass(frozen=True)
class Place:
    """``after_vision`` (projector output), or ``before_layer``: the first layer that sees fewer tokens."""

    kind: Literal["after_vision", "before_layer"]
    at: int | Fraction | None = None
    """0-based layer, or a share of the depth (``3/32`` is layer 3 of a model with 32 layers); None after vision."""

    def layer(self, depth: int) -> int:
        """The 0-based layer in a model of `depth` layers: a share is rounded half up and stays within 1 … depth - 1.

        Raises:
            RecipeError: a layer number at or beyond `depth`.
        """
        if self.at is None:
            return 0
        if isinstance(self.at, int):
            if self.at >= depth:
                raise RecipeError(f"place {self}: the model has {depth} layers, so expected 0 … {depth - 1}")
            return self.at
        return max(1, min(depth - 1, int(self.at * depth + Fraction(1, 2))))

    def __str__(self) -> str:
        if self.at is None:
            return "after_vision"
        return f"before_layer: {self.at}"
