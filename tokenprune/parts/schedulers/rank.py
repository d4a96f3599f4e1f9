"""Counts from the rank of attention."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.budget.rule import plain_fraction
from tokenprune.core import ranks
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.attending import attention_of
from tokenprune.parts.limits import Share, TokenCount
from tokenprune.parts.schedulers.base import ExpectingScheduler
from tokenprune.parts.work import Work


class RankRatioScheduler(ExpectingScheduler):
    """Counts from the rank of the attention of raters over vision tokens: SparseVLM's adaptive level of sparsity.

    A rank cannot exceed the number of raters, so the numerical rank mostly measures the length of the prompt: use
    `energy` to measure how spread out the attention is. Give rope, normalise and layer as to the scorer.

    Args:
        rule: ``delete`` drops scale · (tokens - rank), equation 7; ``keep`` keeps scale · rank + bias, as v1.0 did.
        scale: λ; with ``delete`` higher drops more, with ``keep`` higher keeps more.
        bias: tokens added to what ``keep`` keeps; without effect on ``delete``.
        energy: None counts the singular values above float32 noise; a share counts how many of the largest sum up to
            that share of all: higher gives a higher rank. It tells flat attention from sharp and survives bfloat16.
        at_least: never keep fewer tokens.
        expected: share of the original tokens to assume where a budget for the whole recipe replaces the rank.
        rope: as in the scorer ``attention``.
        normalise: as in the scorer ``attention``.
        layer: as in the scorer ``attention``.
    """

    def __init__(
        self,
        *,
        rule: Literal["delete", "keep"] = "delete",
        scale: Annotated[float, Field(ge=0, le=1000)] = 1.0,
        bias: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0,
        energy: Share | None = None,
        at_least: TokenCount = 1,
        expected: Share = 0.5,
        rope: bool = True,
        normalise: Literal["all", "vision"] = "all",
        layer: Literal["previous", "next"] = "previous",
    ) -> None:
        super().__init__()
        self.rule = rule
        self.scale = scale
        self.bias = bias
        self.energy = energy
        self.at_least = at_least
        self.expected = expected
        self.rope = rope
        self.normalise = normalise
        self.layer = layer
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(attention=self.layer)

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        return self.keep_of(self.rank(tokens, raters), tokens.valid.sum(1))

    def multiply_adds(self, work: Work) -> int:
        """Attention read once more, the Gram matrix of raters × tokens, and its eigenvalues: ⅔ · shorter³."""
        short, long = sorted((work.text, work.tokens))
        attention = work.rater_rows(layer=self.layer)
        return attention + long * short**2 + 2 * short**3 // 3

    def rank(self, tokens: Tokens, raters: Tensor | None) -> Tensor:
        """Rank ``[B]`` int64 of each sample's raters × vision tokens."""
        attention, raters = attention_of(self, tokens, raters)
        matrix = attention.matrix(raters, rope=self.rope, normalise=self.normalise, layer=self.layer)
        # Rows and columns that are 0 do not change singular values: padding and text that does not rate are no worry.
        matrix = matrix * (raters > 0).unsqueeze(-1) * tokens.valid.unsqueeze(1)
        if self.energy is not None:
            return ranks.energy_rank(matrix, self.energy)
        return ranks.numerical_rank(matrix, (raters > 0).sum(1), tokens.valid.sum(1))

    def keep_of(self, rank: Tensor, size: Tensor) -> Tensor:
        """Tokens to keep ``[B]``, from rank and tokens ``[B]`` int64; in whole numbers, so without float error."""
        scale = plain_fraction(self.scale)
        if self.rule == "delete":
            keep = size - scale.numerator * (size - rank) // scale.denominator
        else:
            keep = (scale.numerator * rank + self.bias * scale.denominator) // scale.denominator
        return torch.minimum(keep.clamp(min=self.at_least), size)
