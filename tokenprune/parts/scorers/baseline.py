"""Scores that look at nothing but a token's index: for baselines."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.tokens import Tokens
from tokenprune.parts.limits import Seed
from tokenprune.parts.part import Draws
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import no_products


class RandomScorer(Scorer):
    """Scores that look random: a hash of the seed and the token's original index.

    The same for every sample, batch, beam and run; PyTorch's random state is neither read nor changed.

    Args:
        seed: another number, another choice.
    """

    multiply_adds = no_products

    def __init__(self, *, seed: Seed = 0) -> None:
        super().__init__()
        self.seed = seed
        self.check()

    @property
    def draws(self) -> Draws:
        return Draws("seed", None)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(ops.hashed(tokens.origin, self.seed))


class ConstantScorer(Scorer):
    """The same score for all: for samplers that do not look at scores. With top_k the first tokens survive."""

    multiply_adds = no_products

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(torch.zeros_like(tokens.mass, dtype=torch.float32))


class RasterScorer(Scorer):
    """Later tokens are worth more, so the bottom of the image survives: the position bias that FEATHER found, pure."""

    multiply_adds = no_products

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(tokens.origin.float())
