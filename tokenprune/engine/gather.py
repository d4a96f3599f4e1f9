"""Gathers shared by the engine: rows of a batch at per-sample indices, for tensors of any rank."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core import ops


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Slices of `x` along `dim` at `index` ``[B, n]``, sample by sample. `x` may have batch 1, and live elsewhere."""
    if index.device != x.device:
        index = index.to(x.device)
    dim %= x.dim()
    if dim == 1 and x.dim() > 2:
        return ops.take_rows(x, index)
    if x.shape[0] != index.shape[0]:
        x = x.expand(index.shape[0], *x.shape[1:])
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return x.gather(dim, index.view(shape).expand(*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :]))


def take_positions(ids: Tensor, index: Tensor) -> Tensor:
    """Position ids ``[B, L]`` or ``[3, B, L]`` (M-RoPE) at `index` ``[B, n]``; the batch may be 1."""
    if ids.dim() == 2:
        return take(ids, index, 1)
    return torch.stack([take(axis, index, 1) for axis in ids])


def take_rope(table: Tensor, index: Tensor) -> Tensor:
    """Rotary table ``[B, L, d]``, or ``[3, B, L, d]`` as M-RoPE families had it before 5.13, at `index` ``[B, n]``."""
    if table.dim() == 4:
        return torch.stack([take(axis, index, 1) for axis in table])
    return take(table, index, 1)
