"""A scorer that has learned to read the attention of each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.attending import attention_of
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work

FLOOR = 0.01
"""Attention below this share of what an even look would give counts as this much: a logarithm ends somewhere."""


class GlimpseScorer(Learned, Scorer):
    """Whether to keep a token, as a logit: from what each head of the last layer pays to it, and from what it shows.

    ``score = log(mean over heads) + e · block(H log(heads))``, of attention over the vision tokens as a multiple of an
    even look. In the block tokens attend to each other: queries and keys come from a token's state and from what it
    shows, values from its state. e starts at 0, so that training starts at the plain mean, and at a bar of 0 with the
    tokens that get more than an even share. GlimpsePrune's visual importance predictor, of one block.

    Args:
        dim: width of the block; higher tells more apart and costs more.
        picture: whether it sees what a token shows; without, it goes by attention alone, as a control.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(self, *, dim: Width = 64, picture: bool = True, weights: Weights | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.picture = picture
        self.weights = weights
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(attention="previous", embedding=self.picture)

    def make(self, host: Host) -> None:
        if not host.heads:
            raise RecipeError(f"{self.title} reads the attention of each head, and this model does not say how many")
        shown = self.dim * self.picture
        self.heads = nn.Linear(host.heads, self.dim)
        if self.picture:
            self.shown_norm = nn.LayerNorm(host.width)
            self.shown = nn.Linear(host.width, self.dim)
        self.norm = nn.LayerNorm(self.dim)
        self.query = nn.Linear(self.dim + shown, self.dim, bias=False)
        self.key = nn.Linear(self.dim + shown, self.dim, bias=False)
        self.value = nn.Linear(self.dim, self.dim, bias=False)
        self.mix = nn.Sequential(
            nn.LayerNorm(self.dim), nn.Linear(self.dim, 2 * self.dim), nn.SiLU(), nn.Linear(2 * self.dim, self.dim)
        )
        self.score = nn.Linear(self.dim, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.ready(tokens)
        paid = self.paid(tokens, raters)
        if paid.shape[1] != self.heads.in_features:
            raise InputError(f"{self.title}: its weights are for {self.heads.in_features} heads, got {paid.shape[1]}")
        # Of padding the logarithm is that of the floor: nobody reads it.
        paid = paid * tokens.valid.sum(1)[:, None, None]
        state = self.heads((paid + FLOOR).log().mT)
        told = self.norm(state)
        if self.picture:
            shown = self.shown_norm(tokens.signal("embedding").float())
            if tokens.padded:  # whatever stands there would be multiplied by a weight of 0
                shown = shown.masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
            told = torch.cat([told, self.shown(shown)], -1)
        seen = tokens.valid[:, None] if tokens.padded else None
        state = state + functional.scaled_dot_product_attention(
            self.query(told), self.key(told), self.value(state), seen
        )
        learned = self.score(state + self.mix(state)).squeeze(-1)
        return tokens.only_valid((paid.mean(1) + FLOOR).log() + learned)

    def paid(self, tokens: Tokens, raters: Tensor | None) -> Tensor:
        """Attention ``[B, H, N]`` float32 over the vision tokens alone, of each head."""
        attention, raters = attention_of(self, tokens, raters)
        return attention.scores(raters, normalise="vision").float()

    def looking(self, work: Work) -> int:
        """What `paid` costs, in multiply-adds."""
        return work.rater_rows() + work.raters * work.sequence * work.heads

    def multiply_adds(self, work: Work) -> int:
        """Rows of attention, the projections of each token, and the attention between tokens."""
        shown = self.dim * self.picture
        each = (
            work.heads * self.dim + work.width * shown + 2 * (self.dim + shown) * self.dim + 5 * self.dim**2 + self.dim
        )
        return self.looking(work) + work.tokens * each + 2 * work.tokens**2 * self.dim
