"""Recycling by optimal transport: what is dropped is spread over the survivors, each of which takes as much."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram, ops
from tokenprune.core.merge import Merge
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import Work


class TransportRecycler(Recycler):
    """Spreads every dropped token over the survivors that it is like, so that each survivor takes in the same mass.

    An entropic transport plan at cost 1 - cosine of hidden states, from the masses of the dropped tokens to equal
    capacities. `nearest` lets a survivor amid many alike take in all of them; here what it has no room for goes to the
    next. The sources are settled last, so all of each token goes somewhere: survivors stand for what was dropped,
    exactly. A survivor becomes the mean of itself and of what it takes in, weighted by mass.

    Args:
        temperature: of the plan; lower sends a token to fewer survivors (ε).
        rounds: in which capacities are balanced (Sinkhorn); 0 lets tokens choose freely, by a softmax.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(ge=0.001, le=100)] = 0.1,
        rounds: Annotated[int, Field(ge=0, le=1000)] = 20,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.rounds = rounds
        self.check()

    def added(self, dropped: int) -> int:
        return 0

    def multiply_adds(self, work: Work) -> int:
        """Cosines of all tokens with the survivors, the balance of capacities, and sums of states and masses."""
        return work.tokens * work.kept * (2 * work.width + 1 + self.rounds)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if counts == tokens.sizes or not any(counts):
            return None
        real, at = kept >= 0, kept.clamp(min=0)
        survives = ops.mask_of(kept, n, padded=ops.ragged(counts))
        goes = tokens.valid & ~survives
        x = tokens.hidden.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else tokens.hidden
        alike = gram.cosines(ops.take_rows(x, at), x)  # [B, K, N]
        share = self._shares(alike, real, tokens.mass * goes) * (goes.unsqueeze(1) & real.unsqueeze(2))
        own = (at.unsqueeze(2) == torch.arange(n, device=kept.device)) & real.unsqueeze(2)
        share = share + own.float()
        source = torch.arange(n, device=kept.device).expand(batch, n)
        return Merge(
            source=source.masked_fill(~tokens.valid, -1) if tokens.padded else source,
            target=kept,
            weight=share * tokens.mass.unsqueeze(1),
            anchors=(0,) * batch,
            source_counts=None if tokens.padded else tokens.sizes,
            share=share,
        )

    def _shares(self, alike: Tensor, real: Tensor, mass: Tensor) -> Tensor:
        """``[B, K, N]`` what part of each token goes to each survivor; sums to 1 over the `real` survivors."""
        logits = (alike - 1) / self.temperature
        room = mass.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)  # of one survivor, [B, 1]
        lowest = torch.finfo(logits.dtype).min
        potential = torch.zeros_like(alike[..., :1]).masked_fill(~real.unsqueeze(2), lowest)
        for _ in range(self.rounds):
            taken = ((logits + potential).softmax(1) @ mass.unsqueeze(2)).clamp(min=torch.finfo(logits.dtype).tiny)
            potential = potential + (room.clamp(min=torch.finfo(room.dtype).tiny).unsqueeze(2) / taken).log()
            potential = potential.masked_fill(~real.unsqueeze(2), lowest)
        return (logits + potential).softmax(1)
