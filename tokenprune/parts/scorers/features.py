"""Scores from the features of the vision tokens alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tokenprune.core import gram
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.density import prominence
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work, no_products


class NormScorer(Scorer):
    """Euclidean length of a token's hidden state.

    Args:
        order: ``high`` keeps the longest, ``low`` the shortest.
    """

    multiply_adds = no_products

    def __init__(self, *, order: Literal["high", "low"] = "high") -> None:
        super().__init__()
        self.order = order
        self.check()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        length = tokens.hidden.float().norm(dim=-1)
        return tokens.only_valid(length if self.order == "high" else -length)


class DensityPeaksScorer(Scorer):
    """Tokens that stand for many alike: dense, and far from any denser one (FEATHER's φ_KNN).

    Looks at the vision tokens as they entered the language model, whichever layer it is asked before, and not at the
    question. FEATHER reads the vision tower, one projection earlier, and adds noise against ties; of equals the first
    is the denser one here. Compares all pairs of tokens, in time and in memory.

    Args:
        neighbours: nearest tokens that density counts, the token itself among them; higher smooths it.
        features: tokens as they entered the language model, ``embedding``, or their keys in the layer that has run,
            ``layer_keys`` (PACT).
    """

    def __init__(
        self,
        *,
        neighbours: Annotated[int, Field(ge=1, le=1024)] = 5,
        features: Literal["embedding", "layer_keys"] = "embedding",
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.features = features
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(layer_keys=True) if self.features == "layer_keys" else Needs(embedding=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        features = tokens.signal(self.features).flatten(2)  # later in the model, hidden states are no features any more
        counted = [min(self.neighbours, size) for size in tokens.sizes]
        apart = gram.distances(features.float()) / features.shape[-1] ** 0.5
        return tokens.only_valid(prominence(apart, tokens.valid_if_padded, counted))

    def multiply_adds(self, work: Work) -> int:
        width = work.width if self.features == "embedding" else work.kv_heads * work.head_dim
        return work.tokens**2 * width
