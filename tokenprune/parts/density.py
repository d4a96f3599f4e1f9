"""Density peaks: tokens with many near neighbours and no denser token nearby."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.core import ops


def prominence(apart: Tensor, valid: Tensor | None, neighbours: Sequence[int], near: Tensor | None = None) -> Tensor:
    """Logarithm of density times separation, ``[B, R]``: what makes a token the centre of a cluster.

    Density is that of the nearest neighbours, the token itself included; of equals the lower index is the denser one.
    Separation is the distance to the nearest denser token. The densest has none: its own largest distance stands in
    (SparseVLM's paper), or the largest of all distances (its released code); either makes it the first centre. All in
    logarithms, since densities underflow.

    Args:
        apart: ``[B, R, R]`` float32 distances between tokens. Their scale weighs density against separation.
        valid: ``[B, R]`` bool, False on padding; None without.
        neighbours: of each sample, at most its valid tokens.
        near: ``[B, R, R]`` distances to neighbours where density shall go by others, infinite where a token is none;
            None: `apart`.
    """
    if not apart.shape[1]:
        return apart.new_zeros(apart.shape[:2])
    pair = None if valid is None else valid.unsqueeze(1) & valid.unsqueeze(2)
    known = apart if pair is None else apart.masked_fill(~pair, torch.inf)
    most = max(neighbours)
    squares = (known if near is None else near).topk(most, dim=-1, largest=False, sorted=True).values.square()
    if pair is None and near is None and not ops.ragged(neighbours):
        density = squares.sum(-1) / -most
    else:
        counted = ops.first(neighbours, most, apart.device).unsqueeze(1)
        counted = counted if valid is None else counted & valid.unsqueeze(-1)
        counted = counted if near is None else counted & squares.isfinite()
        density = -squares.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
    ours, theirs = density.unsqueeze(2), density.unsqueeze(1)
    denser = (theirs >= ours).tril(-1) | (theirs > ours).triu(1)
    separation = known.where(denser, torch.inf).amin(-1)
    largest = (apart if pair is None else apart.masked_fill(~pair, 0.0)).amax(-1)
    return density + torch.minimum(separation, largest).log()  # of the densest, the separation is infinite
