"""`Work`: the sizes that a stage works on, from which each part says what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def no_products(part: object, work: Work) -> int:
    """`Part.multiply_adds` of a part that sorts, sums and gathers, but multiplies no matrices: 0."""
    return 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage on one sample. All sizes are plain numbers; costs are multiply-adds of matrix products."""

    tokens: int
    """Vision tokens that come in (N)."""
    kept: int
    """Of these, tokens kept as they are."""
    total: int
    """Original vision tokens of the sample."""
    text: int
    """Text tokens that may rate (T): those of the prompt behind its first image."""
    raters: int
    """Of these, how many may rate at once: rows of attention that are computed (R)."""
    sequence: int
    """All tokens of the present sequence, text included (L)."""
    width: int
    """Numbers per hidden state."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key heads."""
    head_dim: int
    """Numbers per head."""
    tower_width: int = 0
    """Numbers per hidden state of the vision tower."""
    projected: int = 0
    """What the projector takes for a vision token, in multiply-adds; 0 where it does not take them one by one."""

    glimpse: int = 0
    """What one position behind the prompt takes to run through the layers below the place and to look at the vision
    tokens, in multiply-adds; 0 where no part of the stage asks for it."""

    @property
    def dropped(self) -> int:
        return self.tokens - self.kept

    def rater_rows(
        self,
        *,
        layer: Literal["previous", "next"] = "previous",
        gravity: bool = False,
    ) -> int:
        """What `tokenprune.core.attention` and the engine do for one reading of a layer's attention.

        Each of R raters is compared with the keys of all tokens, whichever of them its softmax is over. Queries and
        keys of the previous layer are those that it has computed; of the next layer, which has not run, R queries and
        L keys are projected.
        """
        projected = self.width * self.head_dim * (self.raters * self.heads + self.sequence * self.kv_heads)
        compared = self.raters * self.sequence * self.heads * self.head_dim
        return projected * (layer == "next") + compared + gravity * self.raters * self.tokens * self.head_dim
