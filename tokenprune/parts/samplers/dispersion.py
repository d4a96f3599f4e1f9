"""Sampling by the sum of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.work import Work

_PRECISION = 1e9


class MaxSumSampler(Sampler):
    """Tokens that are far from each other on the whole: each next one has the largest sum of distances to those chosen.

    Max-sum diversity (ToDRE): one minus the cosine of hidden states, summed. The first is the one with the largest sum
    to all tokens. The sum of unit vectors that have been chosen is all that a pick needs, so no pair is compared.
    Scores are not looked at.
    """

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        counts = tokens.counts(count)
        most = max(counts, default=0)
        unit = torch.nn.functional.normalize(tokens.hidden.float(), dim=-1).where(tokens.valid.unsqueeze(-1), 0.0)
        unit = unit if unit.device.type == "mps" else unit.double()
        taken, total = ~tokens.valid, unit.sum(1)
        wanted = ops.first(counts, most, taken.device)
        for pick in range(most):
            # Rounded, so that the order of summation does not decide between equal tokens.
            near = torch.round(unit @ total.unsqueeze(-1) * _PRECISION).squeeze(-1)
            best = (-near).masked_fill(taken, -torch.inf).argmax(1, keepdim=True)  # of equals the first
            picks = wanted[:, pick : pick + 1]
            taken = taken | torch.zeros_like(taken).scatter(1, best, picks)
            new = ops.take_rows(unit, best).squeeze(1) * picks
            total = total + new if pick else new
        return ops.places(taken & tokens.valid, counts)

    def multiply_adds(self, work: Work) -> int:
        return work.tokens * work.kept * work.width
