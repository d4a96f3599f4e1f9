"""Distances between tokens that count by how near the tokens lie to each other on their picture."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core.tokens import Tokens

LEAST = 0.5
"""Weight of a token's distance to what lies nearest; it grows to 1 at the edge of its surroundings (AiluRus's α)."""


def in_surroundings(apart: Tensor, tokens: Tokens, window: int, at: Tensor | None = None) -> Tensor:
    """`apart` ``[B, N, K]``, weighed by how near tokens lie: infinite for what is outside a token's surroundings.

    Of a token's `window` nearest on its grid, itself the first, the r-th from 0 on has the weight
    LEAST + (1 - LEAST) · r / window; of equally near ones the lower index comes first. Tokens of other pictures or
    frames, and padding, are never among them.

    Args:
        apart: distances of all tokens from K of them, float32.
        tokens: of a part that reads the grid.
        window: tokens of the surroundings (AiluRus's λ).
        at: ``[B, K]`` indices of those K; None: all, K = N.
    """
    frame, row, column = tokens.cell.int().unbind(-1)
    far = (row.unsqueeze(2) - row.unsqueeze(1)).square_()
    far += (column.unsqueeze(2) - column.unsqueeze(1)).square_()
    elsewhere = (frame.unsqueeze(2) != frame.unsqueeze(1)) | ~(tokens.valid.unsqueeze(2) & tokens.valid.unsqueeze(1))
    n = far.shape[-1]
    # All different, so that the nearest are the same everywhere.
    far = far.long().mul_(n).add_(torch.arange(n, device=far.device))
    far.masked_fill_(elsewhere, torch.iinfo(far.dtype).max)
    nearest = far.topk(min(window, n), dim=-1, largest=False, sorted=True).indices
    number = torch.arange(nearest.shape[-1], device=far.device).expand_as(nearest)
    rank = torch.full_like(far, window).scatter_(2, nearest, number)
    outside = elsewhere | (rank >= window)
    if at is not None:
        index = at.unsqueeze(1).expand(-1, rank.shape[1], -1)
        rank, outside = rank.gather(2, index), outside.gather(2, index)
    return (apart * (LEAST + (1 - LEAST) * rank.float() / window)).masked_fill(outside, torch.inf)
