"""Sampling by what is least like a few pivots."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram, ops
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.work import Work

Pivots = Annotated[int, Field(ge=0, le=64)]


class PivotSampler(Sampler):
    """Pivots first, then the tokens that are least like them: what duplicates a pivot goes (DART, section 3).

    Pivots are the vision and text tokens with the longest keys, by the sum of their absolute numbers. Each in turn,
    vision before text and longest first, takes the same number of vision tokens out of those that are left, the least
    similar by cosine of hidden states; the last takes what is missing to the count. Vision pivots survive themselves.
    Scores are not looked at.

    Args:
        vision: vision pivots; with a count below it, the longest of them are all that is kept.
        text: text pivots; where the question is shorter, vision pivots stand in, in their order.
    """

    reads = Needs(layer_keys=True, question_states=True)

    def __init__(self, *, vision: Annotated[int, Field(ge=1, le=64)] = 4, text: Pivots = 4) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.check()

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        counts = tokens.counts(count)
        if not any(counts):
            return ops.top_k(scores, counts, tokens.valid_if_padded)
        length = tokens.only_valid(_length(tokens.signal("layer_keys")))
        pivots = [min(self.vision, k) for k in counts]
        chosen = ops.mask_of(ops.top_k(length, pivots, tokens.valid_if_padded), length.shape[1])
        features = self._features(tokens, length)
        alike = gram.cosines(tokens.hidden, features)
        number = features.shape[1]
        missing = [k - own for k, own in zip(counts, pivots, strict=True)]
        each = [-(-left // number) for left in missing]
        for pivot in range(number):
            takes = [max(0, min(q, left - pivot * q)) for q, left in zip(each, missing, strict=True)]
            if any(takes):
                picked = ops.top_k(-alike[..., pivot], takes, tokens.valid & ~chosen)
                chosen = chosen | ops.mask_of(picked, chosen.shape[1])
        return ops.places(chosen, counts)

    def multiply_adds(self, work: Work) -> int:
        return work.tokens * (self.vision + self.text) * work.width

    def _features(self, tokens: Tokens, length: Tensor) -> Tensor:
        """Hidden states ``[B, P, D]`` of the pivots, vision before text."""
        own = _longest(length, self.vision)
        vision = ops.take_rows(tokens.hidden, own).float()
        question = tokens.question
        if not self.text:
            return vision
        stand_in = vision[:, torch.arange(self.text, device=own.device) % own.shape[1]]
        texts = question.embeddings.shape[1]
        if not texts:
            return torch.cat([vision, stand_in], dim=1)
        spoken = _length(question.keys).masked_fill(~question.valid, -torch.inf)
        at = _longest(spoken, self.text)
        there = question.valid.gather(1, at).unsqueeze(-1)
        spoken_for, rest = stand_in[:, : at.shape[1]], stand_in[:, at.shape[1] :]
        words = torch.where(there, ops.take_rows(question.states, at).float(), spoken_for)
        return torch.cat([vision, words, rest], dim=1)


def _length(keys: Tensor) -> Tensor:
    """Sum of the absolute numbers ``[B, N]`` of keys ``[B, N, ...]``."""
    return keys.flatten(2).float().abs().sum(-1)


def _longest(length: Tensor, number: int) -> Tensor:
    """Indices ``[B, P]`` of the longest, in descending order; of equals the first."""
    return length.sort(dim=1, descending=True, stable=True).indices[:, :number]
