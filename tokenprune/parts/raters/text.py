"""Rater selectors that go by the text of the prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenprune.core import gram
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.raters.base import RaterSelector
from tokenprune.parts.work import Work, no_products

_TOLERANCE = 16 * torch.finfo(torch.float32).eps
"""Relative; shares are means of softmax values, so one of exactly 1/T comes out a few units in the last place off."""


class AboveMeanRaters(RaterSelector):
    """Text tokens that resemble the image: each vision token spreads one vote over the text, raters get more than 1/T.

    SparseVLM, equations 4 to 6: softmax over the text of the dot products of embeddings, mean over the vision tokens.
    Where nobody qualifies, the last text token rates.

    Args:
        threshold: ``at_least`` the mean share is the paper's rule; ``above`` it is the released code's, which selects
            nobody when all shares are equal.
    """

    per_prompt = True
    reads = Needs(question=True, embedding=True)

    def __init__(self, *, threshold: Literal["at_least", "above"] = "at_least") -> None:
        super().__init__()
        self.threshold = threshold
        self.check()

    def forward(self, tokens: Tokens) -> Tensor:
        text_valid = tokens.question.valid_if_padded
        texts = tokens.question.embeddings.shape[1] if text_valid is None else text_valid.sum(1, keepdim=True)
        relative = self.shares(tokens) * texts  # 1 is the mean
        if self.threshold == "at_least":
            chosen = relative >= 1 - _TOLERANCE
        else:
            chosen = relative > 1 + _TOLERANCE
        if text_valid is not None:
            chosen = chosen & text_valid
        nobody = ~chosen.any(1, keepdim=True)
        return _weights(chosen | (_last(tokens) & nobody))

    def multiply_adds(self, work: Work) -> int:
        return work.total * work.text * work.width  # of the embeddings, however few tokens are left

    def shares(self, tokens: Tokens) -> Tensor:
        """Share of the vision tokens' votes that each text token gets: ``[B, T]`` float32, sum 1, 0 on padding."""
        entered, text_valid = tokens.original("embedding"), tokens.question.valid_if_padded
        vision, valid = entered.value, entered.valid
        alike = gram.products(vision, tokens.question.embeddings)
        if text_valid is not None:
            # The lowest number instead of -inf: with no text at all, softmax of -inf everywhere would be NaN.
            alike = torch.where(text_valid.unsqueeze(1), alike, torch.finfo(torch.float32).min)
        votes = alike.softmax(-1)
        if valid is None:
            mean = votes.sum(1) / max(1, vision.shape[1])
        else:
            mean = votes.masked_fill(~valid.unsqueeze(-1), 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        return mean if text_valid is None else mean.masked_fill(~text_valid, 0.0)


class LastTextRaters(RaterSelector):
    """The last text token of the prompt is the only rater (FastV, FEATHER, PyramidDrop)."""

    most = 1
    per_prompt = True
    reads = Needs(question=True)
    multiply_adds = no_products

    def forward(self, tokens: Tokens) -> Tensor:
        return _last(tokens).float()


class AllTextRaters(RaterSelector):
    """All text tokens after the image rate, with equal weight."""

    per_prompt = True
    reads = Needs(question=True)
    multiply_adds = no_products

    def forward(self, tokens: Tokens) -> Tensor:
        return _weights(tokens.question.valid)


def _weights(chosen: Tensor) -> Tensor:
    """Equal weights ``[B, T]`` for the chosen, sum 1 where there are any."""
    return chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)


def _last(tokens: Tokens) -> Tensor:
    """``[B, T]`` bool: the last valid text token of each sample, whichever side the padding is on."""
    words, valid = tokens.question.embeddings, tokens.question.valid_if_padded
    if valid is None:
        batch, texts = words.shape[:2]
        return (torch.arange(texts, device=words.device) == texts - 1).expand(batch, -1)
    return valid & (valid.flip(1).cumsum(1).flip(1) == 1)
