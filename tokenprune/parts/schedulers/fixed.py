"""Schedulers whose count follows from the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from tokenprune.budget import count_of
from tokenprune.core.grids import Grid
from tokenprune.errors import BudgetError, InputError
from tokenprune.parts.limits import KeepOrNothing, Share, TokenCount
from tokenprune.parts.schedulers.base import StaticScheduler


class FixedScheduler(StaticScheduler):
    """A share or a number of the *original* vision tokens; at most what is left of them.

    Args:
        keep: a share in (0, 1] or a count; higher keeps more (κ = 1 - R, where papers give the share R that they drop).
            The count 0 drops all: a late stage behind which the model goes on with the text alone (VTW, ToDRE).
    """

    def __init__(self, *, keep: KeepOrNothing) -> None:
        super().__init__()
        self.keep = keep
        self.check()

    @property
    def empties(self) -> bool:
        return self.keep == 0

    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        return 0 if self.empties else min(size, count_of(self.keep, total))


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
