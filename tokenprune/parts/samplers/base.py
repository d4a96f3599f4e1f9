"""The base class of samplers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.part import Part


class Sampler(Part):
    """Picks exactly `count` tokens of each sample. Base class of the role ``sampler``.

    A stage asks it when all counts are known and some token must go. It knows nothing of groups: a stage with a grouper
    calls it with each group as a sample of its own, whose grid is the group's.
    """

    role = "sampler"
    suffix = "Sampler"

    @abstractmethod
    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        """Indices into N of the tokens kept, ``[B, K]`` int64, ascending, without duplicates, -1 padded on the right.

        K is the largest count of the batch. Equal scores are decided by the lower index.

        Args:
            tokens: N vision tokens that entered the stage.
            scores: ``[B, N]`` float32, -inf on padding.
            count: of each sample, at most its tokens.
        """
