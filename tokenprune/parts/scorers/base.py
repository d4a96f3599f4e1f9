"""The base class of scorers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from tokenprune.core.tokens import Tokens
from tokenprune.parts.part import Part


class Scorer(Part):
    """Scores the vision tokens. Base class of the role ``scorer``."""

    role = "scorer"
    suffix = "Scorer"
    needs_raters: ClassVar[bool] = False
    """Whether `forward` needs rater weights."""

    @property
    def needs_attention(self) -> str | None:
        """The layer whose attention it reads: ``"previous"``, ``"next"``, or None when it reads none."""
        return None

    @abstractmethod
    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        """Scores ``[B, N]`` float32, -inf on padding."""
