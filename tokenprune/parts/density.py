"""Density peaks: tokens with many near neighbours and no denser token nearby."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune import ops


def prominence(x: Tensor, valid: Tensor, neighbours: Sequence[int], *, by_width: bool = True) -> Tensor:
    """Logarithm of density times separation, ``[B, R]``: what makes a token the centre of a cluster.

    Density is that of the nearest neighbours, the token itself included; of equals the lower index is the denser one.
    The separation of the densest token is its own largest distance (SparseVLM's paper). Released code takes the largest
    of all distances; that token is the first centre either way, since no other is denser or farther from a denser one.
    In logarithms, as densities underflow. Takes R x R distances of memory.

    Args:
        x: ``[B, R, D]`` float32; `valid` ``[B, R]`` bool.
        neighbours: of each sample, at most its valid tokens.
        by_width: divide distances by the square root of D, which weighs density against separation.
    """
    if not x.shape[1]:
        return x.new_zeros(x.shape[:2])
    apart = ops.distances(x, x)
    if by_width:
        apart = apart / x.shape[-1] ** 0.5
    pair = valid.unsqueeze(1) & valid.unsqueeze(2)
    most = max(neighbours)
    nearest = apart.masked_fill(~pair, torch.inf).topk(most, dim=-1, largest=False, sorted=True).values
    counted = ops.first(neighbours, most, x.device).unsqueeze(1) & valid.unsqueeze(-1)
    density = -nearest.square().masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
    index = torch.arange(x.shape[1], device=x.device)
    ours, theirs = density.unsqueeze(2), density.unsqueeze(1)
    denser = pair & ((theirs > ours) | ((theirs == ours) & (index < index.unsqueeze(1))))
    separation = apart.masked_fill(~denser, torch.inf).amin(-1)
    largest = apart.masked_fill(~pair, 0.0).amax(-1)
    return density + torch.where(denser.any(-1), separation, largest).log()
