"""Scores from how like the words of the question the vision tokens are."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work


class QuestionScorer(Scorer):
    """Cosine of a token and the words of the question: as they enter the language model, or as they stand at the place.

    Published code compares in CLIP's space, where towers of picture and text meet; models without CLIP's text tower
    have none, so this is the form that CDPruner and EADP take on Qwen.

    Args:
        words: ``mean`` over all text tokens; that of the ``last``; the ``max``; or ``focused``, those that point at
            few tokens: the fifth of lowest entropy of softmax(100 · cosine) over the picture, weighted by
            softmax(-entropy / 0.01) (EADP).
        sign: ``like`` keeps what resembles the question; ``unlike`` negates, as published code does in CLIP's space.
        overall: share of the mean word in the score; higher looks more at the whole question (EADP: 0.5).
        states: words as they ``enter`` the language model, or their hidden states at the place, ``here``, where each
            knows what stands before it (GreedyPrune).
    """

    def __init__(
        self,
        *,
        words: Literal["mean", "last", "max", "focused"] = "mean",
        sign: Literal["like", "unlike"] = "like",
        overall: Annotated[float, Field(ge=0, le=1)] = 0.0,
        states: Literal["enter", "here"] = "enter",
    ) -> None:
        super().__init__()
        self.words = words
        self.sign = sign
        self.overall = overall
        self.states = states
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(question=True, question_states=self.states == "here")

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        asked = tokens.question
        if not asked.embeddings.shape[1]:  # no word: all alike
            return tokens.only_valid(torch.zeros_like(tokens.mass))
        real = asked.valid
        words: Tensor = asked.states if self.states == "here" else asked.embeddings
        text = words.masked_fill(~real.unsqueeze(-1), 0.0)
        hidden = tokens.hidden.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else tokens.hidden
        alike = gram.cosines(text, hidden)  # [B, T, N]
        if self.sign == "unlike":
            alike = -alike
        mean = _weighted(alike, real.float())
        scores = {
            "mean": lambda: mean,
            "last": lambda: _weighted(alike, _last(real)),
            "max": lambda: alike.masked_fill(~real.unsqueeze(-1), -1.0).amax(1).where(real.any(1, keepdim=True), 0.0),
            "focused": lambda: _weighted(alike, focus(alike, real, tokens.valid)),
        }[self.words]()
        return tokens.only_valid(torch.lerp(scores, mean, self.overall) if self.overall else scores)

    def multiply_adds(self, work: Work) -> int:
        return work.text * work.tokens * work.width


def focus(alike: Tensor, real: Tensor, valid: Tensor) -> Tensor:
    """Weights ``[B, T]`` of words that point at few vision tokens, from cosines ``[B, T, N]``; they sum to 1.

    The fifth of lowest entropy, rounded up, shares the weight.
    """
    logits = (100 * alike).masked_fill(~valid.unsqueeze(1), torch.finfo(alike.dtype).min)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1).clamp(min=-1e4)).sum(-1)
    entropy = entropy.masked_fill(~real, torch.inf)
    rank = entropy.sort(dim=1, stable=True).indices.argsort(dim=1)
    best = real & (rank < (real.sum(1, keepdim=True) + 4) // 5)
    lowest = entropy.amin(1, keepdim=True).nan_to_num(posinf=0.0)
    weights = torch.exp((lowest - entropy) / 0.01).masked_fill(~best, 0.0)
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _last(real: Tensor) -> Tensor:
    """``[B, T]`` 1 at the last text token of each sample."""
    number = torch.arange(1, real.shape[1] + 1, device=real.device) * real
    return ((number == number.amax(1, keepdim=True)) & real).float()


def _weighted(alike: Tensor, weights: Tensor) -> Tensor:
    """Mean over the words by weights ``[B, T]``: ``[B, N]``."""
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return ((weights / total).unsqueeze(1) @ alike).squeeze(1)
