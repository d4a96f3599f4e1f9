"""Pure tensor functions of the parts: batched, in float32 or integers, and without waiting for the device.

Counts per sample are plain Python numbers, so that every shape is known on the host. Ties go to the lower index
everywhere: half-precision scores tie all the time, and which of two equals `torch.topk` prefers is not defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)

_EQUAL = 2.0**-40  # squared, relative: above the rounding of a float64 dot product, below that of float32 rows


def rational(value: float) -> Fraction:
    """The plain fraction that a decimal number stands for (0.3 is 3/10), so that rounding is immune to float error."""
    return Fraction(value).limit_denominator(10**9)


def ints(values: Sequence[int], device: torch.device) -> Tensor:
    """Python ints as int64 ``[B]`` on `device`, made there: a copy from the host would wait for it."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    return torch.cat([torch.full((1,), value, dtype=torch.int64, device=device) for value in values])


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` from the host on `device`; the copy does not wait for the device."""
    if device.type == "cuda":  # from pageable memory it would
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def download(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy `x` to the host; calling what is returned waits for it, and for nothing that came behind it."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        here = x.cpu()
        return lambda: here
    host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


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
    if valid is None:
        return x.scatter_(1, index, value)
    # padding is written to a last column of its own
    return torch.nn.functional.pad(x, (0, 1)).scatter_(1, index.masked_fill(~valid, n), value)[:, :n]


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
    """`x`, for a compiled graph to compute once: fused into its readers, it is computed anew in each.

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


def distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distances ``[B, R, C]`` between rows of `x` ``[B, R, D]`` and `y` ``[B, C, D]`` (None: `x`), float32.

    From dot products in float64: what their order of summation leaves is far below float32, so equal rows are at
    distance 0 and at equal distances from all others, in any batch. Memory is R·C, never R·C·D.
    """
    if x.device.type == "mps":  # no float64 there: each pair by itself, which gives the same and takes longer
        x = x.float()
        other = x if y is None else y.float()
        return torch.cdist(x, other, compute_mode="donot_use_mm_for_euclid_dist")
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
    return torch.where(squares > scale * _EQUAL, squares, 0.0).sqrt().float()


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
    # The root would blow up rounding: what is 0 but for 1e-16 would count as 1e-8.
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
