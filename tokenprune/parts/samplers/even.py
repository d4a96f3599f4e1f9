"""Samplers that do not look at scores."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import InputError
from tokenprune.parts.limits import Offset, Phase, Seed, Stride
from tokenprune.parts.part import Draws
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.spread import PHASES, spread
from tokenprune.parts.work import no_products


class RandomSampler(Sampler):
    """A choice that looks random: a hash of the seed and the original index, the same in every sample, batch and run.

    Args:
        seed: another number, another choice.
    """

    multiply_adds = no_products

    def __init__(self, *, seed: Seed = 0) -> None:
        super().__init__()
        self.seed = seed
        self.check()

    @property
    def draws(self) -> Draws:
        return Draws("seed", None)

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        return ops.top_k(ops.hashed(tokens.origin, self.seed), tokens.counts(count), tokens.valid_if_padded)


class UniformSampler(Sampler):
    """Tokens evenly spread over the image; scores are not looked at.

    Args:
        stride: None spreads the count over rows and columns as evenly as it goes (over what is left in raster order,
            where an earlier stage has dropped tokens); a number takes every so many rows and columns first (FEATHER's
            φ_uniform), thins them evenly when the count is smaller, and fills up evenly when it is larger.
        offset: first row and column of the strided lattice, less than the stride.
        phase: of four, without a stride: 0 puts each token in the middle of its share of rows and columns, 1 at its top
            left, 2 a quarter of it up and to the right, 3 a quarter down and to the left.
    """

    reads = Needs(grid=True)
    multiply_adds = no_products

    def __init__(self, *, stride: Stride | None = None, offset: Offset = 0, phase: Phase = 0) -> None:
        super().__init__()
        self.stride = stride
        self.offset = offset
        self.phase = phase
        self.check()
        if phase and stride is not None:
            raise InputError(
                f"sampler 'uniform': phase {phase} is for layouts without a stride; give an offset instead"
            )
        if offset and (stride is None or offset >= stride):
            raise InputError(f"sampler 'uniform': offset {offset} must be less than the stride, {stride}")

    @property
    def draws(self) -> Draws | None:
        return Draws("phase", len(PHASES)) if self.stride is None else None

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        counts = tokens.counts(count)
        if self.stride is None:
            return _layout(tokens, counts, self.phase)
        want = transfer.ints(counts, tokens.valid.device)
        points = ops.lattice(tokens.cell, tokens.valid, stride=self.stride, offset=self.offset)
        on_points = torch.minimum(want, points.sum(1))
        chosen = ops.evenly(points, on_points) | ops.evenly(tokens.valid & ~points, want - on_points)
        return ops.places(chosen, counts)


def _layout(tokens: Tokens, counts: tuple[int, ...], phase: int) -> Tensor:
    """Indices ``[B, K]`` of an even layout, worked out on the host."""
    most = max(counts, default=0)
    rows = []
    for size, total, grids, count in zip(tokens.sizes, tokens.total, tokens.grids, counts, strict=True):
        whole = size == total == sum(prod(grid) for grid in grids)  # else an index is no place in the raster
        row = spread(grids if whole else [(1, 1, size)], count, phase=phase)
        rows.append(row + [-1] * (most - count))
    return transfer.upload(torch.tensor(rows, dtype=torch.int64), tokens.valid.device)
