"""`Cells`: which token stands where on its picture, for parts that look around a token or through a region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Cells:
    """All pictures of a batch laid out by cells, with a margin around each: a look-up without a search."""

    stands: Tensor
    """``[B, cells]`` int64, index of the token that stands in each cell; N where none does."""
    place: Tensor
    """``[B, N]`` int64, cell of each token; some cell on padding."""
    columns: int
    """Cells from one row to the next."""

    @classmethod
    def of(cls, tokens: Tokens, margin: int) -> Cells:
        """Of tokens whose part may read the grid; `margin` cells on each side of a picture are empty."""
        shapes = [grid for grids in tokens.grids for grid in grids]
        rows, columns = (max([1, *(shape[axis] for shape in shapes)]) + 2 * margin for axis in (1, 2))
        images = max([1, *(sum([grid[0] for grid in grids]) for grids in tokens.grids)])
        image, row, column = tokens.cell.unbind(-1)
        place = (image * rows + row + margin) * columns + column + margin
        batch, n = tokens.valid.shape
        index = torch.arange(n, device=place.device).expand(batch, n)
        stands = ops.put_(place.new_full((batch, images * rows * columns), n), place, index, tokens.valid)
        return cls(stands, place.masked_fill(~tokens.valid, margin * columns + margin), columns)

    def around(self, down: int | Tensor, right: int | Tensor) -> Tensor:
        """``[B, N]`` index of the token so many rows and columns from each, at most the margin; N where none stands."""
        return self.stands.gather(1, self.place + down * self.columns + right)
