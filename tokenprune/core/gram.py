"""Dot products and distances between all rows of two tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_EQUAL = 2.0**-40  # squared, relative: above the rounding of a float64 dot product, below that of float32 rows


def products(x: Tensor, y: Tensor) -> Tensor:
    """Dot products ``[B, R, C]`` in float32 of rows of `x` ``[B, R, D]`` and `y` ``[B, C, D]``, of any dtype."""
    if sums_halves(x, y):
        return torch.bmm(x, y.mT, out_dtype=torch.float32)
    return x.float() @ y.float().mT


def sums_halves(x: Tensor, y: Tensor) -> bool:
    """Whether the device sums products of these half-precision numbers, each exact in float32, in float32.

    It takes no copy of them in float32, and a fraction of the time.
    """
    half = x.dtype == y.dtype and x.dtype in (torch.bfloat16, torch.float16)
    learning = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)  # that product has no derivative
    return half and x.is_cuda and torch.version.hip is None and not learning


def distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distances ``[B, R, C]`` between rows of `x` ``[B, R, D]`` and `y` ``[B, C, D]`` (None: `x`), float32.

    From dot products in float64: what their order of summation leaves is far below float32, so equal rows are at
    distance 0 and at equal distances from all others, in any batch. Memory is R·C, never R·C·D.
    """
    if x.device.type == "mps":  # no float64 there: each pair by itself, which gives the same and takes longer
        x = x.float()
        other = x if y is None else y.float()
        return torch.cdist(x, other, compute_mode="donot_use_mm_for_euclid_dist")
    return _squares(x, y).sqrt_().float()


def squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared `distances`, float32, without the root in between: arguments as there."""
    return distances(x, y).square() if x.device.type == "mps" else _squares(x, y).float()


def _squares(x: Tensor, y: Tensor | None) -> Tensor:
    """Squared distances in float64; of equal rows exactly 0."""
    x = x.double()
    if y is None:
        dots = x @ x.mT
        ours = theirs = dots.diagonal(dim1=1, dim2=2)
    else:
        y = y.double()
        dots = x @ y.mT
        ours, theirs = x.square().sum(-1), y.square().sum(-1)
    scale = ours.unsqueeze(-1) + theirs.unsqueeze(-2)
    squares = torch.sub(scale, dots, alpha=2)
    return torch.where(squares > scale * _EQUAL, squares, 0.0)


def cosines(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosine similarities ``[B, R, C]`` between rows of `x` ``[B, R, D]`` and `y` ``[B, C, D]`` (None: `x`), float32.

    Rows of length 0 are like nothing, themselves included. Summed in float64 as in `distances`, so that equal rows are
    alike to all others, in any batch.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    unit = torch.nn.functional.normalize(x.to(wide), dim=-1)
    other = unit if y is None else torch.nn.functional.normalize(y.to(wide), dim=-1)
    return (unit @ other.mT).float()
