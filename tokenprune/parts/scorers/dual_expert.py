"""A scorer that asks two experts, of the picture and of the question, and joins what they say."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenprune.core import gram, ops
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.limits import ShareOrNone
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work


class DualExpertScorer(Scorer):
    """How like a token is to the picture as a whole, and to the word that it is most like: LLaVA-Meteor's experts.

    Both are cosines, of other scale and spread, so each is normalised over the sample before they are summed.

    Args:
        weight: of the visual expert; the question's has the rest.
        norm: ``rank`` takes places in the order, ``minmax`` spreads scores from 0 to 1, ``softmax`` makes shares.
        combine: ``sum`` is the weighted mean, ``max`` the better of the two weighted scores: either expert suffices.
    """

    def __init__(
        self,
        *,
        weight: ShareOrNone = 0.5,
        norm: Literal["rank", "minmax", "softmax"] = "rank",
        combine: Literal["sum", "max"] = "sum",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.norm = norm
        self.combine = combine
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(question=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        hidden = tokens.hidden.float().masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
        # In float64, as cosines are: the sum of a padded row is rounded otherwise, and ranks would flip.
        whole = (hidden if hidden.device.type == "mps" else hidden.double()).sum(1, keepdim=True)
        visual = self.weight * self._normal(gram.cosines(hidden, whole).squeeze(-1).float(), tokens)
        asked = tokens.question
        if not asked.embeddings.shape[1]:
            return tokens.only_valid(visual)
        words = asked.embeddings.float().masked_fill(~asked.valid.unsqueeze(-1), 0.0)
        alike = gram.cosines(hidden, words).float().masked_fill(~asked.valid.unsqueeze(1), -1.0).amax(-1)
        native = (1 - self.weight) * self._normal(alike, tokens) * asked.valid.any(1, keepdim=True)
        return tokens.only_valid(visual + native if self.combine == "sum" else torch.maximum(visual, native))

    def _normal(self, score: Tensor, tokens: Tokens) -> Tensor:
        """Scores ``[B, N]`` of one expert on a common scale."""
        if not score.shape[1]:
            return score
        low = score.masked_fill(~tokens.valid, torch.inf).amin(1, keepdim=True)
        score = tokens.only_valid(score)
        if self.norm == "softmax":
            return score.softmax(1)
        if self.norm == "minmax":
            high = score.amax(1, keepdim=True)
            return (score - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny)
        order = score.sort(dim=1, stable=True, descending=True).indices
        places = torch.arange(score.shape[1], device=score.device).expand_as(order)
        place = ops.put_(torch.zeros_like(order), order, places)
        return 1.0 - place / tokens.valid.sum(1, keepdim=True).clamp(min=1)

    def multiply_adds(self, work: Work) -> int:
        """Cosines with the mean and with every word."""
        return work.tokens * work.width * (1 + work.text)
