"""Scores from the features of the vision tokens alone."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.density import prominence
from tokenprune.parts.limits import Window
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.surroundings import in_surroundings
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


class AlternateScorer(Scorer):
    """How unlike a token at an even place is to the likest at an odd place; tokens at odd places are above all (ToMe).

    With `top_k` the most redundant tokens of one half go, and `nearest` with ``within: odd`` adds each to its partner
    of the other half: bipartite soft matching. Places count what comes in, from 0; likeness is the cosine of hidden
    states. Below one half, a count takes tokens at odd places from the end as well.
    """

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        x = tokens.hidden.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else tokens.hidden
        scores = torch.full_like(tokens.mass, 3.0, dtype=torch.float32)  # 1 - cosine is at most 2
        if x.shape[1] > 1:
            alike = gram.cosines(x[:, ::2], x[:, 1::2])
            scores[:, ::2] = 1 - alike.masked_fill(~tokens.valid[:, 1::2].unsqueeze(1), -2.0).amax(-1)
        return tokens.only_valid(scores)

    def multiply_adds(self, work: Work) -> int:
        return (work.tokens // 2) * (work.tokens - work.tokens // 2) * work.width


class DensityPeaksScorer(Scorer):
    """Tokens that stand for many alike: dense, and far from any denser one (FEATHER's φ_KNN).

    Looks at the vision tokens as they entered the language model, whichever layer it is asked before, and not at the
    question. FEATHER reads the vision tower, one projection earlier, and adds noise against ties; of equals the first
    is the denser one here. Compares all pairs of tokens, in time and in memory.

    Args:
        neighbours: nearest tokens that density counts, the token itself among them; higher smooths it.
        features: tokens as they entered the language model, ``embedding``; as they stand at the place, ``hidden``, the
            only ones inside the vision tower (AiluRus); or their keys in the layer that has run, ``layer_keys`` (PACT).
        window: None looks for neighbours all over the sample; a number among so many tokens that lie nearest on the
            picture, where distances weigh the less the nearer tokens lie (AiluRus's λ).
    """

    def __init__(
        self,
        *,
        neighbours: Annotated[int, Field(ge=1, le=1024)] = 5,
        features: Literal["embedding", "hidden", "layer_keys"] = "embedding",
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.features = features
        self.window = window
        self.check()

    @property
    def reads(self) -> Needs:
        read, grid = self.features, self.window is not None
        return Needs(embedding=read == "embedding", layer_keys=read == "layer_keys", grid=grid)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        # Later in the model, hidden states are no features any more.
        features = tokens.hidden if self.features == "hidden" else tokens.signal(self.features).flatten(2)
        counted = [min(self.neighbours, size) for size in tokens.sizes]
        apart = gram.distances(features.float()) / features.shape[-1] ** 0.5
        near = None if self.window is None else in_surroundings(apart, tokens, self.window)
        return tokens.only_valid(prominence(apart, tokens.valid_if_padded, counted, near))

    def multiply_adds(self, work: Work) -> int:
        width = work.kv_heads * work.head_dim if self.features == "layer_keys" else work.width
        return work.tokens**2 * width
