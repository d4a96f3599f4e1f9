"""Recycling by a learned scan over the whole picture."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.core import ops
from tokenprune.core.cells import Cells
from tokenprune.core.merge import Merge, only
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import Work


class FusionRecycler(Learned, Recycler):
    """Every survivor takes in its surroundings and the whole picture, by a window and a scan, at linear cost.

    Each token first sums its neighbours on the grid, weighted channel by channel; then ``h_t = a_t h_{t-1} + (1 - a_t)
    b_t`` runs over the question, and from there over the picture, forwards and backwards, with gates a of the token
    itself. ``state = x + E gelu(forwards + backwards)`` for survivors; E starts at 0, so training starts exactly at
    `drop`. LLaVA-Meteor's flash global fusion (local to single) with the simplest of selective state spaces.

    Args:
        dim: channels of the scan; higher carries more and costs more.
        reach: rows and columns of the neighbourhood on each side; 0 looks at the token alone.
        question: whether the scan starts with the question.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(
        self,
        *,
        dim: Width = 64,
        reach: Annotated[int, Field(ge=0, le=4)] = 1,
        question: bool = True,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.reach = reach
        self.question = question
        self.weights = weights
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(grid=True, question=self.question)

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.narrow = nn.Linear(host.width, self.dim)
        self.kernel = nn.Parameter(torch.randn((2 * self.reach + 1) ** 2, self.dim) / (2 * self.reach + 1))
        self.gate = nn.Linear(self.dim, 2 * self.dim)
        self.expand = nn.Linear(self.dim, host.width)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        if self.question:
            self.text_norm = nn.LayerNorm(host.width)
            self.text = nn.Linear(host.width, self.dim)

    def added(self, dropped: int) -> int:
        return 0

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        self.ready(tokens)
        counts = tokens.counts(count)
        if counts == tokens.sizes or not any(counts):
            return None
        own = torch.eye(kept.shape[1], device=kept.device) * (kept >= 0).unsqueeze(-1)
        plan = Merge(source=kept, target=kept, weight=own, hard=True, anchors=(0,) * len(counts))
        return only(plan, [k < size for k, size in zip(counts, tokens.sizes, strict=True)])

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        at = plan.target.clamp(min=0)
        found = ops.take_rows(self._scanned(tokens), at)
        return ops.take_rows(tokens.hidden, at).float() + self.expand(functional.gelu(found))

    def _scanned(self, tokens: Tokens) -> Tensor:
        """``[B, N, dim]`` what the scans have gathered at each token."""
        local = self._local(tokens)
        real = tokens.valid.unsqueeze(-1)
        first = local.new_zeros(local.shape[0], 0, self.dim), real[:, :0]
        if self.question:
            words = self.text(self.text_norm(tokens.question.embeddings.float()))
            first = words, tokens.question.valid.unsqueeze(-1)
        both = local.new_zeros(local.shape)
        for direction, part in enumerate((slice(None, self.dim), slice(self.dim, None))):
            picture, there = (local, real) if not direction else (local.flip(1), real.flip(1))
            given, kept = torch.cat([first[0], picture], 1), torch.cat([first[1], there], 1)
            passes = torch.sigmoid(self.gate(given)[..., part]).masked_fill(~kept, 1.0)  # padding changes nothing
            state = scan(passes, ((1 - passes) * given).masked_fill(~kept, 0.0))[:, first[0].shape[1] :]
            both = both + (state if not direction else state.flip(1))
        return both

    def _local(self, tokens: Tokens) -> Tensor:
        """``[B, N, dim]`` weighted sums over each token's neighbours on its picture, as many as are still there."""
        channels = self.narrow(self.norm(tokens.hidden.float())).masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
        reach, window = self.reach, 2 * self.reach + 1
        cells = Cells.of(tokens, reach)
        padded = functional.pad(channels, (0, 0, 0, 1))  # what stands nowhere is 0
        total = torch.zeros_like(channels)
        for number, weight in enumerate(self.kernel):
            near = cells.around(number // window - reach, number % window - reach)
            total = total + weight * ops.take_rows(padded, near)
        return total

    def multiply_adds(self, work: Work) -> int:
        """Projections of tokens and words, gates in both directions, and the window; a scan multiplies no matrices."""
        words = work.text * self.question
        gated = 2 * self.dim * 2 * self.dim * (work.tokens + words)
        return self.dim * work.width * (work.tokens + words + work.kept) + gated


def scan(a: Tensor, b: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` along dimension 1, from h = 0: ``[B, N, D]``, in log₂ N steps over all at once.

    Each step joins every stretch to the one before it: a stretch is how much of what came before passes through, and
    what it adds (Hillis and Steele 1986).
    """
    step = 1
    while step < a.shape[1]:
        before_a = functional.pad(a, (0, 0, step, 0), value=1.0)[:, : a.shape[1]]
        before_b = functional.pad(b, (0, 0, step, 0))[:, : a.shape[1]]
        a, b, step = a * before_a, a * before_b + b, 2 * step
    return b
