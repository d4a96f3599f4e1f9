"""The base class of scorers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from tokenprune.core.tokens import Tokens
from tokenprune.parts.part import Part


class Scorer(Part):
    """Scores the vision tokens. Base class of the role ``scorer``.

    A stage asks it behind the raters, whenever something may be dropped; its scores go to scheduler, sampler and
    recycler.
    """

    role = "scorer"
    suffix = "Scorer"

    @abstractmethod
    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        """Scores ``[B, N]`` float32, -inf on padding.

        Args:
            tokens: N vision tokens that entered the stage.
            raters: ``[B, T]`` rater weights; None where the stage has none.
        """
