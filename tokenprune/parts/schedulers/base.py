"""The base classes of schedulers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from tokenprune.core.grids import Grid
from tokenprune.core.tokens import Tokens
from tokenprune.parts.part import Part
from tokenprune.parts.work import no_products


class Scheduler(Part):
    """Decides how many tokens the sampler keeps (what a recycler adds comes on top). Base of the role ``scheduler``.

    A static one is asked for `count` before anything runs, on the host. Any other is asked behind the scorer, by
    `forward`, and its answer is waited for. Where a budget has fixed the counts, only `nominal` is asked.
    """

    role = "scheduler"
    suffix = "Scheduler"

    @property
    def static(self) -> bool:
        """Whether the count follows from shapes alone, so that `count` may be asked."""
        return False

    @property
    def empties(self) -> bool:
        """Whether it is there to drop every token: then it keeps 0 under every budget but a full one."""
        return False

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


class ExpectingScheduler(Scheduler):
    """A scheduler whose counts the scores decide, and which says what share it expects to keep."""

    at_least: int
    """Tokens that it never goes below."""
    expected: float
    """Share of the original tokens that a budget for the whole recipe scales instead of the counts."""

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return min(float(size), max(float(self.at_least), self.expected * total))


class StaticScheduler(Scheduler):
    """A scheduler that never needs scores: serving engines size the sequence first, and static shapes compile."""

    multiply_adds = no_products

    @property
    def static(self) -> bool:
        return True

    @abstractmethod
    def count(self, size: int, *, total: int, grids: Sequence[Grid]) -> int:
        """Tokens to keep, 1 … `size` (0 when `size` is 0, or the scheduler `empties`); arguments as in `nominal`."""

    def nominal(self, size: int, *, total: int, grids: Sequence[Grid]) -> float:
        return float(self.count(size, total=total, grids=grids))

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> tuple[int, ...] | Tensor:
        return tuple(
            self.count(size, total=total, grids=grids)
            for size, total, grids in zip(tokens.sizes, tokens.total, tokens.grids, strict=True)
        )
