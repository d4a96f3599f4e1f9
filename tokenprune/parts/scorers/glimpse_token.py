"""The scorer `glimpse` with a token of its own behind the prompt, which learns where to look."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.learned import Host, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.scorers.glimpse import GlimpseScorer
from tokenprune.parts.work import Work

SPREAD = 0.02
"""Standard deviation that the token's vectors start with, as GlimpsePrune's."""


class GlimpseTokenScorer(GlimpseScorer):
    """Whether to keep a token, as a logit: from what each head of a learned token behind the prompt pays to it.

    The predictor is that of `glimpse`; whose attention it reads is learned, too. The token stands right behind the
    prompt, which does not see it. It has a vector for each decoder layer: the first is what enters the first layer,
    each further one is added to its hidden state before a layer (GlimpsePrune, arXiv:2508.01548). It runs through the
    layers below the stage and no further; vectors of later layers stay as they are.

    Args:
        dim: width of the predictor's block; higher tells more apart and costs more.
        picture: whether it sees what a token shows; without, it goes by attention alone, as a control.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(self, *, dim: Width = 64, picture: bool = True, weights: Weights | None = None) -> None:
        super().__init__(dim=dim, picture=picture, weights=weights)

    @property
    def reads(self) -> Needs:
        return Needs(glimpse=True, embedding=self.picture)

    def make(self, host: Host) -> None:
        if not host.depth:
            raise RecipeError(f"{self.title} has a vector for each decoder layer, and this model does not say how many")
        super().make(host)
        self.token = nn.Parameter(SPREAD * torch.randn(host.depth, host.width))

    def check_host(self, host: Host) -> None:
        """As `Learned.check_host`; the number of layers, too."""
        super().check_host(host)
        if self.token.shape[0] != host.depth:
            raise InputError(
                f"{self.title}: its weights were made for {self.token.shape[0]} decoder layers, and this model has "
                f"{host.depth}; fit the recipe to it: tokenprune fit RECIPE --model MODEL --data DIR"
            )

    def paid(self, tokens: Tokens, raters: Tensor | None) -> Tensor:
        """Attention ``[B, H, N]`` of the token over the vision tokens alone.

        Raises:
            InputError: no decoder layers have run that it could have seen the prompt in.
        """
        if tokens.glimpse is None:
            raise InputError(
                f"{self.title} looks from behind the prompt, and no decoder layers have run here. Give "
                "Tokens(glimpse=...), see tokenprune.core.tokens, or prune before a layer instead of after vision"
            )
        return tokens.glimpse(self.token).float()

    def looking(self, work: Work) -> int:
        """What the token takes through the layers, and its row of attention."""
        return work.glimpse
