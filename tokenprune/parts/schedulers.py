"""Schedulers: how many vision tokens survive a stage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import ops
from tokenprune.budget import count_of
from tokenprune.errors import BudgetError, InputError
from tokenprune.parts.limits import Keep, Offset, Share, ShareOrNone, Stride, TokenCount
from tokenprune.parts.part import Part
from tokenprune.parts.work import Work
from tokenprune.tokens import Grid, Tokens


class Scheduler(Part):
    """Decides how many tokens the sampler keeps (what a recycler adds comes on top). Base of the role ``scheduler``."""

    role = "scheduler"
    suffix = "Scheduler"

    @property
    def static(self) -> bool:
        """Whether the count follows from shapes alone, so that `count` may be asked."""
        return False

    @property
    def needs_attention(self) -> str | None:
        """The layer whose attention it reads: ``"previous"``, ``"next"``, or None when it reads none."""
        return None

    @abstractmethod
    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        """Tokens (a real number) that the stage keeps as a rule: the shape that a budget for the whole recipe scales.

        Args:
            size: real vision tokens of the sample that enter the stage.
            total: original vision tokens of the sample.
            grids: (T, H, W) of each of its images.
        """

    @abstractmethod
    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        """Counts, one per sample: Python ints when static, else int64 ``[B]`` on the device of the scores."""


class StaticScheduler(Scheduler):
    """A scheduler that never needs scores: serving engines size the sequence first, and static shapes compile."""

    @property
    def static(self) -> bool:
        return True

    @abstractmethod
    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        """Tokens to keep, 1 … `size` (0 when `size` is 0); arguments as in `nominal`."""

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return float(self.count(size, total=total, grids=grids))

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        return tuple(
            self.count(size, total=total, grids=grids)
            for size, total, grids in zip(tokens.sizes, tokens.total, tokens.grids, strict=True)
        )


class FixedScheduler(StaticScheduler):
    """A share or a number of the *original* vision tokens; at most what is left of them.

    Args:
        keep: a share in (0, 1] or a count; higher keeps more (κ = 1 - R, where papers give the share R that they drop).
    """

    def __init__(self, *, keep: Keep) -> None:
        super().__init__()
        self.keep = keep
        self.check()

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        return min(size, count_of(self.keep, total))


class TableScheduler(StaticScheduler):
    """Counts from a table: original vision tokens to tokens kept.

    Between two rows the share is interpolated, outside the table it is the nearest row's.

    Args:
        rows: ``{576: 300}`` keeps 300 of 576; several rows, when the share should depend on the size of the image.
    """

    def __init__(self, *, rows: Annotated[dict[TokenCount, TokenCount], Field(min_length=1, max_length=64)]) -> None:
        super().__init__()
        self.rows = rows
        self.check()
        for original, kept in rows.items():
            if kept > original:
                raise InputError(f"scheduler 'table': row {original} keeps {kept}, more than there are")

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        share = self._share(total)
        return min(size, max(1, share.numerator * total // share.denominator))

    def _share(self, total: int) -> Fraction:
        table = sorted(self.rows.items())
        below = [row for row in table if row[0] <= total] or table[:1]
        above = [row for row in table if row[0] >= total] or table[-1:]
        (low, kept_low), (high, kept_high) = below[-1], above[0]
        share = Fraction(kept_low, low)
        if low < total < high:
            share += (Fraction(kept_high, high) - share) * Fraction(total - low, high - low)
        return share


class SolvedScheduler(StaticScheduler):
    """No count of its own: the budget of the whole recipe is shared out among the stages.

    Args:
        share: relative size of this stage; higher keeps more here and less at the other stages.
    """

    def __init__(self, *, share: Share = 1.0) -> None:
        super().__init__()
        self.share = share
        self.check()

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return self.share * total

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        raise BudgetError(
            "scheduler 'solved' takes its count from a budget for the whole recipe, and there is none: add "
            "'budget: {keep: 0.33}' to the recipe, or give the stage a scheduler like {type: fixed, keep: 300}"
        )


class PyramidScheduler(StaticScheduler):
    """A share of the tokens that *enter* the stage, rounded down.

    Args:
        keep: higher keeps more (PyramidDrop's λ; at FEATHER's second stage κ², which is (1 - R)²).
    """

    def __init__(self, *, keep: Share) -> None:
        super().__init__()
        self.keep = keep
        self.check()

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        return count_of(self.keep, size)


class LatticeScheduler(StaticScheduler):
    """As many as a strided lattice of rows and columns holds, and as many again as the best scores add to it.

    FEATHER's first stage: the union of the best κn tokens and every third row and column. For the sampler ``union``.

    Args:
        stride: every so many rows and columns; higher keeps fewer (FEATHER's s).
        offset: first row and column of the lattice, less than the stride.
        keep: share of the original tokens that is taken by score; higher keeps more, 0 keeps the lattice alone (κ).
        size: ``exact`` counts the union, whose size depends on the data, as in the paper; ``fixed`` is the size that it
            has on average, so that counts are known from shapes alone.
    """

    def __init__(
        self,
        *,
        stride: Stride,
        offset: Offset = 0,
        keep: ShareOrNone = 0.0,
        size: Literal["exact", "fixed"] = "exact",
    ) -> None:
        super().__init__()
        self.stride = stride
        self.offset = offset
        self.keep = keep
        self.size = size
        self.check()
        if offset >= stride:
            raise InputError(f"scheduler 'lattice': offset {offset} must be less than the stride, {stride}")

    @property
    def static(self) -> bool:
        return self.size == "fixed" or self.keep == 0

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        """The size of the union if lattice and scores have nothing to do with each other."""
        points = self._points(total, grids)
        more = ops.rational(self.keep) * (total - points)
        return float(min(size, max(1, points + int(more + Fraction(1, 2)))))

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        if not self.static:
            raise InputError("scheduler 'lattice' with size 'exact' needs scores; size 'fixed' is known from shapes")
        return min(size, int(self.nominal(size, total=total, grids=grids)))

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        if self.static:
            return super().forward(tokens, scores, raters)
        best = [min(n, count_of(self.keep, total)) for n, total in zip(tokens.sizes, tokens.total, strict=True)]
        chosen = ops.mask_of(ops.top_k(scores, best, tokens.valid_if_padded), scores.shape[1])
        return (chosen | ops.lattice(tokens.cell, tokens.valid, stride=self.stride, offset=self.offset)).sum(1)

    def _points(self, total: int, grids: Sequence[Grid]) -> int:
        """Lattice points in all images of a sample."""
        along = [[len(range(self.offset, side, self.stride)) for side in grid[1:]] for grid in grids]
        return min(total, sum(grid[0] * rows * columns for grid, (rows, columns) in zip(grids, along, strict=True)))


class RankRatioScheduler(Scheduler):
    """Counts from the rank of the attention of raters over vision tokens: SparseVLM's adaptive level of sparsity.

    The rank is at most the number of raters, so with the numerical rank the count follows the length of the prompt.
    Give rope, normalise and layer as to the scorer.

    Args:
        rule: ``delete`` drops scale · (tokens - rank), equation 7; ``keep`` keeps scale · rank + bias, as v1.0 did.
        scale: λ; with ``delete`` higher drops more, with ``keep`` higher keeps more.
        bias: tokens added to what ``keep`` keeps; without effect on ``delete``.
        energy: None counts the singular values above float32 noise; a share counts how many of the largest sum up to
            that share of all: higher gives a higher rank. It tells flat attention from sharp and survives bfloat16.
        at_least: never keep fewer tokens.
        expected: share of the original tokens to assume where a budget for the whole recipe replaces the rank.
        rope: as in the scorer ``attention``.
        normalise: as in the scorer ``attention``.
        layer: as in the scorer ``attention``.
    """

    def __init__(
        self,
        *,
        rule: Literal["delete", "keep"] = "delete",
        scale: Annotated[float, Field(ge=0, le=1000)] = 1.0,
        bias: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0,
        energy: Share | None = None,
        at_least: TokenCount = 1,
        expected: Share = 0.5,
        rope: bool = True,
        normalise: Literal["all", "vision"] = "all",
        layer: Literal["previous", "next"] = "previous",
    ) -> None:
        super().__init__()
        self.rule = rule
        self.scale = scale
        self.bias = bias
        self.energy = energy
        self.at_least = at_least
        self.expected = expected
        self.rope = rope
        self.normalise = normalise
        self.layer = layer
        self.check()

    @property
    def needs_attention(self) -> str | None:
        return self.layer

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return min(float(size), max(float(self.at_least), self.expected * total))

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        return self.keep_of(self.rank(tokens, raters), tokens.valid.sum(1))

    def multiply_adds(self, work: Work) -> int:
        """Attention read once more, the Gram matrix of raters × tokens, and its eigenvalues: ⅔ · shorter³."""
        short, long = sorted((work.text, work.tokens))
        attention = work.rater_rows(layer=self.layer)
        return attention + long * short**2 + 2 * short**3 // 3

    def rank(self, tokens: Tokens, raters: Tensor | None) -> Tensor:
        """Rank ``[B]`` int64 of each sample's raters × vision tokens."""
        if tokens.attention is None or raters is None:
            missing = "raters" if raters is None else "the attention of a language model (there is none at this place)"
            raise InputError(f"scheduler 'rank_ratio' needs {missing}")
        matrix = tokens.attention.matrix(raters, rope=self.rope, normalise=self.normalise, layer=self.layer)
        # Rows and columns that are 0 do not change singular values: padding and text that does not rate are no worry.
        matrix = matrix * (raters > 0).unsqueeze(-1) * tokens.valid.unsqueeze(1)
        if self.energy is not None:
            return ops.energy_rank(matrix, self.energy)
        return ops.numerical_rank(matrix, (raters > 0).sum(1), tokens.valid.sum(1))

    def keep_of(self, rank: Tensor, size: Tensor) -> Tensor:
        """Tokens to keep ``[B]``, from rank and tokens ``[B]`` int64; in whole numbers, so without float error."""
        scale = Fraction(self.scale).limit_denominator(10**6)
        if self.rule == "delete":
            keep = size - scale.numerator * (size - rank) // scale.denominator
        else:
            keep = (scale.numerator * rank + self.bias * scale.denominator) // scale.denominator
        return torch.minimum(keep.clamp(min=self.at_least), size)
