"""Ranks of small matrices, without an SVD."""

from __future__ import annotations

import torch
from torch import Tensor


def numerical_rank(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rank ``[B]`` int64 of each matrix: singular values above max(rows, columns) · ε · σ₁, as in `matrix_rank`.

    ε is float32's, whatever the dtype: what counts is the noise that attention was computed with.

    Args:
        matrix: ``[B, T, N]``; rows and columns that do not count are 0.
        rows: ``[B]``, rows that count.
        columns: ``[B]``, columns that count.
    """
    values = squared_singular_values(matrix)
    tolerance = torch.maximum(rows, columns).unsqueeze(1) * torch.finfo(torch.float32).eps
    return (values > tolerance.double() ** 2 * values[:, :1]).sum(1)


def energy_rank(matrix: Tensor, energy: float) -> Tensor:
    """Rank ``[B]`` int64 of each matrix ``[T, N]``: the fewest singular values that sum up to `energy` of all."""
    squares = squared_singular_values(matrix)
    # Zero eigenvalues first: rounding leaves about 1e-16, and its square root, 1e-8, would pass for a singular value.
    noise = max(matrix.shape[1:]) * torch.finfo(torch.float64).eps * squares[:, :1]
    values = squares.where(squares > noise, 0.0).sqrt()
    total = values.sum(1, keepdim=True)
    reached = values.cumsum(1) >= energy * total * (1 - 1e-6)  # with energy 1, rounding must not ask for one more
    enough = (~reached).sum(1) + 1
    return torch.where(total.squeeze(1) > 0, enough.clamp(max=values.shape[1]), torch.zeros_like(enough))


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Squares of the singular values ``[B, min(T, N)]`` of each matrix ``[T, N]``, float64, the largest first.

    They are the eigenvalues of the Gram matrix of the shorter side: one product and a small symmetric problem in place
    of an SVD. In float64 products of float32 numbers are exact, and what rounding is left in the sums is some 1e-16 of
    the largest, where the tolerance of `numerical_rank`, squared, is at least 1e-14 of it: the rank comes out at
    least as well as from an SVD in float32.
    """
    x = matrix.double() if matrix.device.type != "mps" else matrix.cpu().double()  # MPS has no float64, and no SVD
    x = x if x.shape[1] <= x.shape[2] else x.mT
    return torch.linalg.eigvalsh(x @ x.mT).flip(1).clamp(min=0).to(matrix.device)
