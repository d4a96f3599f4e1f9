"""Scorers with weights of their own, fitted to a model by `tokenprune fit`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work


class TextConditionedScorer(Learned, Scorer):
    """How well a vision token matches the question, by two projections that have learned what the model looks for.

    ``score = log Σ over words of exp((K x) · (Q t) / √dim) + mlp(x)``, of normalised states: BUS's text-semantics-aware
    selector and SmartTrim's cross-modal trimmer in their smallest form. It runs before the language model and costs two
    thin products, yet it may be distilled from attention deep inside it.

    Args:
        dim: width of the projections; higher tells more apart and costs more.
        question: whether the question is read; without it the score is of the picture alone, as a control.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(self, *, dim: Width = 64, question: bool = True, weights: Weights | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.question = question
        self.weights = weights
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(question=self.question)

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.own = nn.Sequential(nn.Linear(host.width, self.dim), nn.GELU(), nn.Linear(self.dim, 1))
        if self.question:
            self.text_norm = nn.LayerNorm(host.width)
            self.key = nn.Linear(host.width, self.dim, bias=False)
            self.query = nn.Linear(host.width, self.dim, bias=False)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.ready(tokens)
        seen = self.norm(tokens.hidden.float())
        scores: Tensor = self.own(seen).squeeze(-1)
        if self.question and tokens.question.embeddings.shape[1]:
            asked = tokens.question
            words = self.query(self.text_norm(asked.embeddings.float()))
            match = torch.einsum("bnd, btd -> bnt", self.key(seen), words) / self.dim**0.5
            # A soft maximum: every word gets a gradient, and one that matches is enough.
            if not asked.padded:
                scores = scores + match.logsumexp(-1)
            else:
                best = match.masked_fill(~asked.valid[:, None], torch.finfo(match.dtype).min).logsumexp(-1)
                scores = scores + best.where(asked.valid.any(1)[:, None], 0.0)  # a sample without words
        return tokens.only_valid(scores)

    def multiply_adds(self, work: Work) -> int:
        own = work.tokens * self.dim * (work.width + 1)
        matched = self.dim * (work.width * (work.tokens + work.text) + work.tokens * work.text)
        return own + self.question * matched
