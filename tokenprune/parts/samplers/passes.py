"""Samplers of two passes: the second chooses among what the first has left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.budget.rule import plain_fraction
from tokenprune.core import gram, ops, transfer
from tokenprune.core.likest import Likest
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import InputError
from tokenprune.parts.limits import Share, TowerBlock
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.samplers.greedy import Features, features
from tokenprune.parts.tower import signal_of
from tokenprune.parts.work import Work, no_products

_BEYOND = 2**20
"""More windows than a side of a picture has."""


class TowerFirstSampler(Sampler):
    """First a share of the count by a signal of the vision tower, then the best scores among the others.

    VScan takes one half by the attention of an early block, window by window; HiPrune the tokens that a middle block
    looks at, with their four neighbours.

    Args:
        signal: what the first pass goes by.
        block: of the tower, from 0, from the end below 0, or a share of its depth; null: the last that is read.
        share: of the count, for the first pass, rounded, one half down; higher leaves less to the scores.
        window: the first pass spreads over windows of so many rows and columns (VScan); null: it looks at the whole
            picture.
        windows: every window gives its ``even`` share of what is taken, one more where the count does not divide (VScan
            on LLaVA); or shares are ``capped`` there, and windows with little to look at may give less (on Qwen).
        neighbours: the tokens above, below, left and right of those taken survive too, and do not count for the share
            (HiPrune). Where all together are more than the count, those with the best scores survive.
    """

    multiply_adds = no_products

    def __init__(
        self,
        *,
        signal: Literal["class_attention", "received_attention"] = "class_attention",
        block: TowerBlock = None,
        share: Share = 0.5,
        window: Annotated[int, Field(ge=1, le=4096)] | None = None,
        windows: Literal["even", "capped"] = "even",
        neighbours: bool = False,
    ) -> None:
        super().__init__()
        self.signal = signal
        self.block = block
        self.share = share
        self.window = window
        self.windows = windows
        self.neighbours = neighbours
        self.check()
        if windows == "capped" and window is None:
            raise InputError(f"{self.title}: windows: capped without windows; give their side, such as window: 4")
        self._name = signal_of(self, signal, block)

    @property
    def reads(self) -> Needs:
        return Needs(tower=self._name, grid=self.neighbours or self.window is not None)

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        counts = tokens.counts(count)
        first = shares_of(self.share, counts)
        looked = tokens.only_valid(tokens.signal(self._name).float())
        taken = ops.top_k(looked, first, tokens.valid_if_padded)
        if self.window is not None:
            taken = by_window(tokens, looked, first, self.window, even=self.windows == "even")
        chosen = ops.mask_of(taken, looked.shape[1])
        if self.neighbours:
            chosen = chosen | _beside(tokens.cell, ops.take_rows(tokens.cell, taken.clamp(min=0)), taken >= 0)
        return ops.top_k(scores, counts, tokens.valid_if_padded, prefer=chosen)


class BestFirstSampler(Sampler):
    """First a share of the count by the scores, then others for what they cover; scores alone pick lookalikes.

    VisPruner keeps one half by attention and thins the rest until no lookalikes are left; PruMerge+ adds evenly spread
    tokens to the most attended ones, TopV to those that carry most.

    Args:
        share: of the count, for the best scores, rounded, one half down; higher leaves less to the second pass.
        then: the others lie ``evenly`` over what the first pass has left, in raster order (PruMerge+, TopV); or are
            ``distinct``: lookalikes go, a few at a time, until the count is left (VisPruner).
        features: with ``distinct``, tokens are alike by the cosine of their ``hidden`` states at the place, or of what
            the ``tower`` has given to the projector.
        step: with ``distinct``, so many go at a time: higher is faster and coarser.
    """

    def __init__(
        self,
        *,
        share: Share = 0.5,
        then: Literal["evenly", "distinct"] = "evenly",
        features: Features = "hidden",
        step: Annotated[int, Field(ge=1, le=1024)] = 8,
    ) -> None:
        super().__init__()
        self.share = share
        self.then = then
        self.features = features
        self.step = step
        self.check()
        if then == "evenly" and features == "tower":
            raise InputError(f"{self.title}: features 'tower' are for then: distinct; an even spread looks at none")

    @property
    def reads(self) -> Needs:
        return Needs(tower="hidden") if self.features == "tower" else Needs()

    def multiply_adds(self, work: Work) -> int:
        """With ``distinct``, all cosines."""
        width = work.tower_width if self.features == "tower" else work.width
        return work.tokens**2 * width * (self.then == "distinct")

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        counts = tokens.counts(count)
        first = shares_of(self.share, counts)
        best = ops.mask_of(ops.top_k(scores, first, tokens.valid_if_padded), scores.shape[1])
        others = tokens.valid & ~best
        more = [k - own for k, own in zip(counts, first, strict=True)]
        if self.then == "evenly":
            spread = ops.evenly(others, transfer.ints(more, others.device))
            return ops.places(best | spread, counts)
        left = [size - own for size, own in zip(tokens.sizes, first, strict=True)]
        return ops.places(best | self._distinct(tokens, scores, others, left, more), counts)

    def _distinct(
        self, tokens: Tokens, scores: Tensor, others: Tensor, left: Sequence[int], more: Sequence[int]
    ) -> Tensor:
        """``[B, N]`` bool: `more` of the `left` others of each sample, without those most like another.

        Round by round the others are lined up by their scores; each at an even place counts as like another as it is
        to the likest at an odd place, and the likest go: `step` of them, or as few as are still too many.
        """
        x = features(tokens, self.features)
        line = (scores + 0.0).sort(dim=1, descending=True, stable=True).indices
        likest = Likest(gram.cosines(ops.take_rows(x, line)))  # here a token is called by its place in the line of all
        stays, left = others.gather(1, line), list(left)
        while any(size > want for size, want in zip(left, more, strict=True)):
            goes = [min(self.step, size - size // 2, size - want) for size, want in zip(left, more, strict=True)]
            odd_now = stays & (stays.cumsum(1) % 2 == 0)  # the second, the fourth, … of those that are left
            even = ops.places(stays & ~odd_now, [size - size // 2 for size in left])
            gone = ops.top_k(likest(even, odd_now, stays), goes, even >= 0)
            gone = even.gather(1, gone.clamp(min=0)).masked_fill(gone < 0, -1)
            stays = stays & ~ops.mask_of(gone, x.shape[1])
            left = [size - number for size, number in zip(left, goes, strict=True)]
        return torch.zeros_like(stays).scatter(1, line, stays)


def shares_of(share: float, counts: Sequence[int]) -> tuple[int, ...]:
    """`share` of each count, rounded, one half down: plain numbers."""
    ratio = plain_fraction(share)
    twice = 2 * ratio.denominator
    return tuple(-((ratio.denominator - 2 * ratio.numerator * k) // twice) for k in counts)


def by_window(tokens: Tokens, looked: Tensor, first: Sequence[int], side: int, *, even: bool) -> Tensor:
    """Indices ``[B, K]`` of the tokens of highest `looked`, at most an even share of `first` in each window; or -1.

    Args:
        tokens: whose cells are read.
        looked: ``[B, N]`` scores, -inf on padding.
        first: how many of each sample.
        side: rows and columns of a window; those at the right and bottom may be smaller.
        even: whether each window also gives at least its even share, rounded down, as far as it has tokens.
    """
    image, row, column = tokens.cell.unbind(-1)
    rank = rank_within(looked, (image * _BEYOND + row // side) * _BEYOND + column // side)
    windows = ((rank == 0) & tokens.valid).sum(1, keepdim=True).clamp(min=1)
    share = transfer.ints(first, looked.device).unsqueeze(1)
    within = (rank < (share + windows - 1) // windows) & tokens.valid
    best = ops.top_k(
        looked.masked_fill(~within, -torch.inf),
        first,
        tokens.valid_if_padded,
        prefer=within & (rank < share // windows) if even else within,
    )
    # Small windows may not have their even share: then fewer are taken.
    return best.masked_fill(~within.gather(1, best.clamp(min=0)), -1)


def _beside(cell: Tensor, own: Tensor, real: Tensor) -> Tensor:
    """``[B, N]`` bool: tokens in cells ``[B, N, 3]`` above, below, left or right of one of those ``[B, A, 3]``."""
    image, row, column = (cell[:, None, :, i] - own[..., None, i] for i in range(3))
    return ((image == 0) & (row.abs() + column.abs() == 1) & real.unsqueeze(2)).any(1)


def rank_within(scores: Tensor, group: Tensor) -> Tensor:
    """``[B, N]`` int64, how many tokens of its group come before each: higher scores, and of equals the lower index.

    Args:
        scores: ``[B, N]``.
        group: ``[B, N]`` int64, at least 0.
    """
    order = (scores.float() + 0.0).sort(dim=1, descending=True, stable=True).indices
    of = group.gather(1, order).sort(dim=1, stable=True)
    start = torch.searchsorted(of.values, of.values)
    rank = torch.arange(group.shape[1], device=group.device) - start
    return torch.zeros_like(rank).scatter(1, order.gather(1, of.indices), rank)
