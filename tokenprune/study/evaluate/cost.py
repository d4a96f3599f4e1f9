"""What the prefill of each question costs: the ledger's closed form, at the tokens that really ran."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenprune.builder import build
from tokenprune.core.grids import UnknownGrid
from tokenprune.cost.account import account
from tokenprune.errors import InputError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.shape import model_shape

if TYPE_CHECKING:
    import torch

    from tokenprune.core.report import Report
    from tokenprune.recipe import Recipe


class Meter:
    """Counts multiply-adds from pixels to the first token: vision tower, projector, decoder layers, method, lm_head.

    Args:
        model: a supported model; only its configuration is read, and which input ids are vision tokens.

    Raises:
        UnsupportedModelError: no adapter or no shape is known for the model.
    """

    def __init__(self, model: Any) -> None:
        self._anatomy = anatomy(model)
        self._shape = model_shape(model)
        self._build = lru_cache(maxsize=None)(lambda recipe: build(recipe, depth=self._shape.decoder.layers))
        self._prefill = lru_cache(maxsize=None)(self._count)

    def prefills(self, recipe: Recipe, report: Report, ids: torch.Tensor, real: torch.Tensor) -> list[int]:
        """Multiply-adds of each sample's prefill, as if it had run alone: padding of the batch does not count.

        Args:
            recipe: what was attached; `none` costs what the untouched model costs.
            report: of that prefill.
            ids: ``[B, L]`` input ids.
            real: ``[B, L]`` True or 1 where there is no padding.

        Raises:
            InputError: the grids of a sample are not known.
        """
        real = real.bool()
        vision = self._anatomy.vision_mask(ids, ids) & real
        other = real & ~vision
        text, question = other.sum(1).tolist(), (other & (vision.cumsum(1) > 0)).sum(1).tolist()
        kept = zip(*((stage.kept >= 0).sum(1).tolist() for stage in report.stages), strict=True)
        rows: Sequence[tuple[int, ...]] = list(kept) or [()] * len(report.total)
        if any(isinstance(grid, UnknownGrid) for own in report.grids for grid in own):
            raise InputError(
                "cost: the prompt does not tell the grids of its pictures, so the tower's work is not known"
            )
        sizes = zip(report.total, report.grids, text, question, rows, strict=True)
        return [self._prefill(recipe, *size) for size in sizes]

    def _count(
        self, recipe: Recipe, total: int, grids: tuple[Any, ...], text: int, question: int, kept: tuple[int, ...]
    ) -> int:
        told = account(
            self._shape, self._build(recipe), total=total, grids=grids, text=text, question=question, kept=kept
        )
        return told.reduced.prefill
