"""`Groups`: vision tokens split into windows, images, frames and the like, and any sampler run on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.grids import Grid
from tokenprune.core.signals import Question, Signal, Undeclared, Unreadable
from tokenprune.core.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each token of a stage belongs to. Sizes are plain numbers, so that counts are shared out exactly."""

    index: Tensor
    """``[B, N]`` int64, 0 … groups of the sample - 1; -1 on padding."""
    sizes: tuple[tuple[int, ...], ...]
    """Of each sample, the tokens in each of its groups; 0 where all are gone."""
    grids: tuple[tuple[Grid, ...], ...]
    """Of each sample, the (T, H, W) that its groups' tokens fill in raster order; (1, 1, size) where they fill none."""
    weights: tuple[tuple[float, ...], ...] | None = None
    """Of each sample, what each of its groups is due, at least 0, in any unit; None: as many tokens as it has."""


def share_out(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` split in proportion to `sizes` by largest remainder: exact, and never more than a size.

    Of equal remainders the first gets the token.
    """
    total = sum(sizes)
    shares = [count * size // total for size in sizes] if total else [0] * len(sizes)
    remainders = [count * size % total if total else 0 for size in sizes]
    neediest = sorted(range(len(sizes)), key=lambda i: -remainders[i])
    for i in neediest[: count - sum(shares)]:
        shares[i] += 1
    return shares


def share_by(count: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """`count` split in proportion to `weights` by largest remainder: exact, and never more than a size.

    What a full group cannot take goes to the others in proportion; where none of those is due anything, by their sizes.
    Weights are compared as whole numbers, to 1e-12 of the largest.
    """
    most = max(weights, default=0.0)
    due = [round(10**12 * weight / most) if most > 0 else 0 for weight in weights]
    shares = [0] * len(sizes)
    unfilled, left = [i for i, size in enumerate(sizes) if size], count
    while unfilled:
        if not any(due[i] for i in unfilled):
            due = list(sizes)
        total = sum(due[i] for i in unfilled)
        full = [i for i in unfilled if due[i] * left >= sizes[i] * total]
        if not full:
            break
        for i in full:
            shares[i], left = sizes[i], left - sizes[i]
        unfilled = [i for i in unfilled if i not in full]
    total = sum(due[i] for i in unfilled)
    for i in unfilled:
        shares[i] = due[i] * left // total
    neediest = sorted(unfilled, key=lambda i: -(due[i] * left % total))
    for i in neediest[: count - sum(shares)]:
        shares[i] += 1
    return shares


@dataclass(frozen=True, eq=False)
class Folded:
    """The groups of a batch as samples of their own: R rows in all, of at most W tokens."""

    tokens: Tokens
    """``[R, W, ...]``, one group a row. Cells count from the group's own first row and column, `total` is the tokens of
    the group; `origin` stays that of the whole sample, so that chance falls differently in each group."""
    at: Tensor
    """``[R, W]`` indices into N of its sample, -1 on padding."""
    owner: tuple[int, ...]
    """The sample of each row."""
    flat: Tensor
    """``[R, W]`` indices into all tokens of all samples, B · N; anything on padding."""

    def of(self, x: Tensor, fill: float) -> Tensor:
        """Numbers ``[R, W]`` of the same tokens, from ``[B, N]``, with `fill` on padding."""
        return x.flatten()[self.flat].masked_fill(self.at < 0, fill)


def fold(tokens: Tokens, groups: Groups) -> Folded:
    """Each group as a sample of its own, so that a sampler which knows nothing of groups works on one at a time."""
    device, (batch, n) = tokens.valid.device, tokens.valid.shape
    sizes = tuple(size for sample in groups.sizes for size in sample)
    owner = tuple(row for row, sample in enumerate(groups.sizes) for _ in sample)
    # Tokens sorted by group (stable, so in raster order within each), padding last; a group is then one stretch.
    behind = groups.index.masked_fill(groups.index < 0, torch.iinfo(torch.int64).max)
    order = behind.sort(dim=1, stable=True).indices
    order = order + torch.arange(0, batch * n, n, device=device).unsqueeze(1)
    stretches = transfer.upload(_stretches(groups.sizes, n), device)
    valid = stretches >= 0
    flat = order.flatten()[stretches.clamp(min=0)]
    rows = transfer.upload(torch.tensor(owner, dtype=torch.int64), device)

    def of(x: Tensor) -> Tensor:
        """Rows ``[R, W, ...]`` of ``[B, N, ...]``, each token copied once."""
        return x.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, *x.shape[2:])

    gone = ~valid
    origin = of(tokens.origin)
    cell = tokens.cell
    grids: tuple[tuple[Grid, ...], ...] = tuple((grid,) for sample in groups.grids for grid in sample)
    if isinstance(cell, Unreadable):  # the sampler has not declared that it reads them, or they are not known
        grids = tokens.grids[:1] * len(sizes)
    else:
        cell = of(cell)
        first = cell.masked_fill(gone.unsqueeze(-1), torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        cell = (cell - first).masked_fill(gone.unsqueeze(-1), 0)
    position = tokens.position
    folded = replace(
        tokens,
        hidden=of(tokens.hidden),
        valid=valid,
        origin=origin.masked_fill(gone, -1),
        slot=of(tokens.slot).masked_fill(gone, 0),
        cell=cell,
        position=of(position) if position.dim() == 2 else torch.stack([of(axis) for axis in position]),
        mass=of(tokens.mass).masked_fill(gone, 0.0),
        bias=None if tokens.bias is None else of(tokens.bias).masked_fill(gone, 0.0),
        sizes=sizes,
        total=sizes,
        grids=grids,
        # Attention is not split; what says that the sampler has not declared it stays.
        attention=tokens.attention if isinstance(tokens.attention, Undeclared) else None,
        signals=tokens.signals.mapped(
            lambda name: Signal(of(tokens.signal(name)), valid, origin.masked_fill(gone, max(tokens.total)))
        ),
    )
    if isinstance(tokens.question, Question):  # else the sampler has not declared that it reads it
        folded = replace(folded, question=tokens.question.of(rows))
    at = flat - n * rows.unsqueeze(1)
    return Folded(folded, at.masked_fill(gone, -1), owner, flat)


def _stretches(sizes: Sequence[Sequence[int]], n: int) -> Tensor:
    """``[R, W]`` where each group stands among the sorted tokens of all samples, n a sample; -1 on padding."""
    width = max([size for sample in sizes for size in sample], default=0)
    places: list[list[int]] = []
    for number, sample in enumerate(sizes):
        start = number * n
        for size in sample:
            places.append([*range(start, start + size), *[-1] * (width - size)])
            start += size
    return torch.tensor(places, dtype=torch.int64).view(-1, width)


def unfold(kept: Tensor, folded: Folded, counts: Sequence[int], n: int) -> Tensor:
    """What was kept of each group, ``[R, K']`` indices into W, as ``[B, K]`` ascending indices into N, -1 on padding.

    Args:
        counts: tokens kept of each sample, over all its groups.
        n: N.
    """
    index = folded.at.gather(1, kept.clamp(min=0))
    owner = transfer.upload(torch.tensor(folded.owner, dtype=torch.int64), kept.device)
    flat = (index + n * owner.unsqueeze(1)).where(kept >= 0, kept.new_full((), len(counts) * n))
    mask = torch.zeros(len(counts) * n + 1, dtype=torch.bool, device=kept.device)
    mask = mask.index_fill(0, flat.flatten(), True)[:-1].view(len(counts), n)
    return ops.places(mask, counts)


def rectangle(size: int, grid: Grid) -> Grid:
    """`grid` where `size` tokens fill it, else one row of them."""
    return grid if prod(grid) == size else (1, 1, size)
