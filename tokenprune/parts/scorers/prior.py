"""Scores from attention, corrected by the attention that tokens get whatever is asked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.attending import attention_of
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work

_NOTHING = 1e-10
"""Added to both shares of attention before their logarithm (PriorTR)."""


class InformationScorer(Scorer):
    """What the raters' attention tells beyond a prior: P · log(P / Q), the token's share of their divergence (PriorTR).

    P is the raters' attention to the vision tokens, mean over heads and summing to 1. Q is the same of the first text
    token behind the last image, which has not seen the question: a line break or an end mark in most prompts. What both
    look at, sinks and the bottom of the image, is no information. Where that token is the rater itself, or there is
    none, the score is that of plain attention.

    Args:
        layer: whose queries and keys: of the ``previous`` layer, which has run, or of the ``next`` one.
    """

    def __init__(self, *, layer: Literal["previous", "next"] = "previous") -> None:
        super().__init__()
        self.layer = layer
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(attention=self.layer, question=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        attention, raters = attention_of(self, tokens, raters)
        task = _shares(attention.scores(raters, layer=self.layer).float().mean(1))
        prior = _shares(attention.scores(_first_behind(tokens, raters), layer=self.layer).float().mean(1))
        return tokens.only_valid(task * ((task + _NOTHING).log() - (prior + _NOTHING).log()))

    def multiply_adds(self, work: Work) -> int:
        return 2 * (work.rater_rows(layer=self.layer) + work.raters * work.sequence * work.heads)


def _shares(attention: Tensor) -> Tensor:
    """``[B, N]`` that sum to 1; 0 where there is no attention at all."""
    return attention / attention.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _first_behind(tokens: Tokens, raters: Tensor) -> Tensor:
    """Rater weights ``[B, T]`` that are 1 at the first text token behind the last image, unless it is a rater."""
    question = tokens.question
    slots = tokens.slot if tokens.valid_if_padded is None else tokens.slot.masked_fill(~tokens.valid, -1)
    last = torch.nn.functional.pad(slots, (0, 1), value=-1).amax(1, keepdim=True)
    behind = question.valid & (question.slot > last)  # type: ignore[operator]
    first = behind & (behind.cumsum(1) == 1) & (raters == 0)
    return first.float()
