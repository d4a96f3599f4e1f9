"""The base class of recyclers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.part import Part


class Recycler(Part):
    """Turns the dropped tokens into nothing, or into a few merged tokens. Base class of the role ``recycler``."""

    role = "recycler"
    suffix = "Recycler"

    @abstractmethod
    def added(self, dropped: int) -> int:
        """Merged tokens that it makes of `dropped` tokens: known without data, at most `dropped`, 0 for 0."""

    @abstractmethod
    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> tuple[Tokens, Tensor]:
        """Survivors and merged tokens together, in raster order; kept tokens and text are bit-identical.

        Args:
            tokens: N vision tokens before the stage.
            kept: ``[B, K]`` indices into N, -1 where padded.
            scores: ``[B, N]`` float32.
            count: tokens kept of each sample (of each row of `kept`), as plain numbers.

        Returns:
            The new `Tokens`, and ``[B, M]`` indices into N of the anchors: the dropped tokens whose slot, position and
            origin a merged token takes over (-1 where padded).
        """
