"""A scorer whose scores are logits of keeping a token, for counts of the sample's own."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work


class TrimmerScorer(Learned, Scorer):
    """Whether to keep a token, as a logit: from the token, the picture as a whole, and the question as a whole.

    ``mlp(norm(a, a ∘ w, g, w))`` of projections a of the token, g of the mean token and w of the mean word; keep minus
    drop. With the scheduler ``threshold`` each sample keeps as many as it needs. SmartTrim's cross-modal token trimmer.

    Args:
        dim: width of the projections; higher tells more apart and costs more.
        question: whether the question is read; without it the score is of the picture alone, as a control.
        bias: the logit that training starts around; higher keeps everything at first.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(
        self,
        *,
        dim: Width = 64,
        question: bool = True,
        bias: Annotated[float, Field(ge=-20, le=20)] = 2.0,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.question = question
        self.bias = bias
        self.weights = weights
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(question=self.question)

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.token = nn.Linear(host.width, self.dim)
        self.picture = nn.Linear(host.width, self.dim)
        self.text_norm = nn.LayerNorm(host.width)
        self.word = nn.Linear(host.width, self.dim)
        self.policy = nn.Sequential(
            nn.LayerNorm(4 * self.dim), nn.Linear(4 * self.dim, self.dim), nn.GELU(), nn.Linear(self.dim, 2)
        )

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.ready(tokens)
        seen = self.norm(tokens.hidden.float())
        if tokens.padded:
            seen = seen.masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
        size = tokens.valid.sum(1, keepdim=True).clamp(min=1)
        asked = tokens.question.mean() if self.question else torch.zeros_like(seen[:, 0])
        own = self.token(seen)
        word = self.word(self.text_norm(asked)).unsqueeze(1).expand_as(own)
        picture = self.picture(seen.sum(1) / size).unsqueeze(1).expand_as(own)
        drop, keep = self.policy(torch.cat([own, own * word, picture, word], -1)).unbind(-1)
        return tokens.only_valid(keep - drop + self.bias)

    def multiply_adds(self, work: Work) -> int:
        """Projections of tokens, picture and question, and the two layers of the policy."""
        return self.dim * (work.width * (work.tokens + 2) + work.tokens * (4 * self.dim + 2))
