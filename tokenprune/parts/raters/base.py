"""The base class of rater selectors, which weigh the text tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from tokenprune.core.tokens import Tokens
from tokenprune.parts.part import Part


class RaterSelector(Part):
    """Weighs the text tokens. Base class of the role ``raters``.

    A stage asks it first, and only if a part of the stage reads raters and something is to be dropped.
    """

    role = "raters"
    suffix = "Raters"
    most: ClassVar[int | None] = None
    """Text tokens of a sample that may have weight at once, known without data: attention is computed for so many rows.
    None where all may."""
    per_prompt: ClassVar[bool] = False
    """Whether settings and prompt alone decide: its text, and its vision tokens as they entered the language model.
    The weights are then the same at every place, and computed once for all stages of a prefill."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """Rater weights ``[B, T]`` float32: at least 0, sum 1 over the valid text of each sample, 0 on padding.

        A sample without valid text has no raters: its weights are all 0.
        """
