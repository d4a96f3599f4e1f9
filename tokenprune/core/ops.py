"""Pure tensor functions of the parts: batched, in float32 or integers, and without waiting for the device.

Counts per sample are plain Python numbers, so that every shape is known on the host. Ties go to the lower index
everywhere: half-precision scores tie all the time, and which of two equals `torch.topk` prefers is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tokenprune.core.transfer import ints

Number = TypeVar("Number", int, Tensor)


def first(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """``[B, width]`` bool: True at the first ``counts[i]`` places of row i."""
    return torch.arange(width, device=device) < ints(counts, device).unsqueeze(-1)


def put_(x: Tensor, index: Tensor, value: Tensor | bool, valid: Tensor | None = None) -> Tensor:
    """Write `value`, one or ``[B, K]``, into `x` ``[B, N]`` at the places named in `index`, ``[B, K]``, and return it.

    Args:
        valid: ``[B, K]`` bool, False where `index` is padding and nothing is written; None without padding. A copy is
            written to and returned where it is given.
    """
    n = x.shape[1]
    written = value if isinstance(value, Tensor) else int(value)  # torch.jit.trace knows no operator of a Python bool
    if valid is None:
        return x.scatter_(1, index, written)
    # padding is written to a last column of its own
    return torch.nn.functional.pad(x, (0, 1)).scatter_(1, index.masked_fill(~valid, n), written)[:, :n]


def mask_of(index: Tensor, width: int, *, padded: bool = True) -> Tensor:
    """``[B, width]`` bool: True at the places named in `index` ``[B, K]``, where -1 is padding (if it is `padded`)."""
    mask = torch.zeros(index.shape[0], width, dtype=torch.bool, device=index.device)
    return put_(mask, index, True, index >= 0 if padded else None)


def places(mask: Tensor, counts: Sequence[int]) -> Tensor:
    """Where `mask` ``[B, N]`` is True, ascending: ``[B, max(counts)]`` int64, -1 padded on the right.

    Args:
        counts: True entries of each row, known to the caller.
    """
    return counted_places(mask.cumsum(1), counts)


def counted_places(counted: Tensor, counts: Sequence[int]) -> Tensor:
    """`places` of a mask whose True entries have been `counted` along each row, ``[B, N]``."""
    index = reaching(counted, torch.arange(1, max(counts, default=0) + 1, device=counted.device)[None])
    return index.masked_fill(index == counted.shape[1], -1) if ragged(counts) else index


def reaching(counted: Tensor, number: Tensor) -> Tensor:
    """Where the running count `counted` ``[B, N]`` first is at least `number` ``[B or 1, K]``: ``[B, K]``, else N."""
    return torch.searchsorted(counted, number.expand(counted.shape[0], -1).contiguous())


def ragged(counts: Sequence[int]) -> bool:
    """Whether rows of so many entries need padding."""
    return len(set(counts)) > 1


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Slices of `x` ``[B or 1, N, ...]`` at `index` ``[B, K]`` (at least 0 each): ``[B, K, ...]``.

    Whole rows are copied at once, which neither a gather of single numbers nor an index of two dimensions does.
    """
    return x.flatten(0, 1).index_select(0, _flat(index, x)).view(*index.shape, *x.shape[2:])


def put_rows_(x: Tensor, index: Tensor, rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """As `put_`: `rows` ``[B, K, D]`` into `x` ``[B, N, D]``, whose memory is one block, at `index` ``[B, K]``."""
    n = x.shape[1]
    if valid is not None:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
        return put_rows_(x, index.masked_fill(~valid, n), rows)[:, :n]
    x.view(-1, x.shape[2]).index_copy_(0, _flat(index, x), rows.flatten(0, 1))
    return x


def _flat(index: Tensor, x: Tensor) -> Tensor:
    """`index` ``[B, K]`` into each sample of `x` ``[B or 1, N, ...]`` as ``[B · K]`` into the rows of all samples."""
    batch, n = x.shape[0], max(1, x.shape[1])
    if batch == 1:
        return index.flatten()
    return (index + torch.arange(0, batch * n, n, device=x.device)[:, None]).flatten()


def in_memory(x: Tensor) -> Tensor:
    """`x`, stored by a compiled graph; else inductor recomputes it inside every kernel that reads it.

    Inductor itself stores what it counts as heavy, but sines are not on its list (pytorch/pytorch#128339 is about it).
    """
    if not torch.compiler.is_compiling():
        return x
    return x.new_empty(x.shape).index_copy(0, torch.arange(x.shape[0], device=x.device), x)


def top_k(scores: Tensor, counts: Sequence[int], valid: Tensor | None = None, prefer: Tensor | None = None) -> Tensor:
    """Indices of the highest scores of each row, ascending: ``[B, max(counts)]`` int64, -1 padded on the right.

    A stable sort puts the lower index first among equals.

    Args:
        scores: ``[B, N]``, compared in float32; no NaN.
        counts: how many of each row, at most its valid entries.
        valid: ``[B, N]`` bool, entries that may be taken; None: all.
        prefer: ``[B, N]`` bool, entries that come before all others, whatever their scores.
    """
    n = scores.shape[1]
    exact = scores.float() + 0.0  # -0.0 becomes 0.0, its equal: a sort by bits would tell them apart
    if valid is not None:
        exact = torch.where(valid, exact.clamp(min=torch.finfo(exact.dtype).min), -torch.inf)
    order = exact.sort(dim=1, descending=True, stable=True).indices
    if prefer is not None:
        flags = (prefer if valid is None else prefer & valid).gather(1, order).byte()
        order = order.gather(1, flags.sort(dim=1, descending=True, stable=True).indices)
    most = max(counts, default=0)
    best = order[:, :most]
    if ragged(counts):
        best = best.masked_fill(~first(counts, most, scores.device), -1)
    # another sort, of indices, would take a GPU longer than counting does
    return places(mask_of(best, n, padded=ragged(counts)), counts)


def evenly(mask: Tensor, counts: Tensor) -> Tensor:
    """`counts` ``[B]`` of the True entries of `mask` ``[B, N]`` (at most all of them), evenly spread along the row."""
    size = mask.sum(1, keepdim=True)
    rank = mask.cumsum(1)
    want = counts.unsqueeze(1)
    # Entry number `rank` is taken where the running quota rank · want / size, rounded, makes a step.
    quota = (2 * rank * want + size) // (2 * size).clamp(min=1)
    before = (2 * (rank - 1) * want + size) // (2 * size).clamp(min=1)
    return mask & (quota > before)


def is_shown(mask: Tensor) -> Tensor:
    """Bool of the same shape: where an attention mask, bool or added to the logits, lets a query look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def lattice(cell: Tensor, valid: Tensor, *, stride: int, offset: int) -> Tensor:
    """``[B, N]`` bool: valid tokens in every `stride`-th row and column of their image, from `cell` ``[B, N, 3]``."""
    row, column = cell[..., 1], cell[..., 2]
    return valid & (row % stride == offset) & (column % stride == offset)


def _mix(x: Number) -> Number:
    """A 32-bit integer hash; factors below 2^31, so that products never overflow int64."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def hashed(index: Tensor, seed: int) -> Tensor:
    """Float32 in [0, 1) that look random and depend on (`seed`, index) alone: no generator, no state, any batch."""
    salt = _mix(seed + 0x9E3779B9 & 0xFFFFFFFF)
    mixed = _mix(_mix(index & 0xFFFFFFFF) ^ salt)
    return (mixed >> 8).float() * 2.0**-24
