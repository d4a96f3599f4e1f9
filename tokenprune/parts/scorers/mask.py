"""A scorer that is told where to look: an oracle, for upper bounds and for labels."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.limits import ShareOrNone
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import no_products

Box = Annotated[list[ShareOrNone], Field(min_length=4, max_length=4)]
"""Left, top, right and bottom, as shares of the picture."""


class MaskScorer(Scorer):
    """How much of a token's cell lies inside given boxes: what Fine-Grained Visual Prompting leaves unblurred.

    It tells how good a choice could be that knew the place of the answer, and no method can: an upper bound to
    measure others by. Boxes are of one picture, so a recipe with them is for that picture. Cells in several boxes count
    the largest overlap. Tokens that lie in no box all score 0.

    Args:
        boxes: left, top, right and bottom of each, as shares of the picture, such as ``[[0.1, 0.2, 0.5, 0.6]]``.
    """

    reads = Needs(grid=True)
    multiply_adds = no_products

    def __init__(self, *, boxes: Annotated[list[Box], Field(min_length=1, max_length=64)]) -> None:
        super().__init__()
        self.boxes = boxes
        self.check()
        for left, top, right, bottom in boxes:
            if left >= right or top >= bottom:
                told = [left, top, right, bottom]
                raise InputError(f"scorer 'mask': the box {told} is empty; expected left < right and top < bottom")

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        scores = torch.zeros(tokens.valid.shape, device=tokens.hidden.device)
        row, column = tokens.cell[..., 1].float(), tokens.cell[..., 2].float()
        rows, columns = self._shape(tokens)
        for left, top, right, bottom in self.boxes:
            down = _overlap(row, top * rows, bottom * rows)
            across = _overlap(column, left * columns, right * columns)
            scores = torch.maximum(scores, down * across)
        return tokens.only_valid(scores)

    def _shape(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Rows and columns ``[B, N]`` of the picture that each token lies on."""
        most = max([1, *(sum([grid[0] for grid in grids]) for grids in tokens.grids)])
        table = [[shape for frames, *shape in grids for _ in range(frames)] for grids in tokens.grids]
        padded = [each + [[1, 1]] * (most - len(each)) for each in table]
        shape = torch.tensor(padded, dtype=torch.float32, device=tokens.hidden.device)  # [B, images, 2]
        own = shape.gather(1, tokens.cell[..., :1].expand(-1, -1, 2))
        return own[..., 0], own[..., 1]


def _overlap(at: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Length of what the cell from `at` to `at` + 1 shares with the stretch from `low` to `high`."""
    return (torch.minimum(at + 1, high) - torch.maximum(at, low)).clamp(min=0.0)
