"""`StageResult`: what a stage hands on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.core.merge import Merge
from tokenprune.core.stage_report import without
from tokenprune.core.tokens import Tokens


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage made of its tokens."""

    tokens: Tokens
    """Survivors and merged tokens, in raster order."""
    merged: Tensor
    """``[B, A]`` original indices of the anchors: dropped tokens whose slot now holds a merged token; -1 on padding."""
    written: Tensor | None
    """``[B, M]`` which of `tokens` have a new hidden state, anchors and survivors alike, -1 on padding; None: none."""
    written_padded: bool
    """Whether `written` has padding: known on the host."""
    scores: Tensor | None
    """``[B, N]`` float32 scores of the tokens that came in; None when all were kept and nothing was scored."""
    weights: Tensor | None = None
    """``[B, T]`` rater weights; None without raters, and where nothing was scored."""
    plan: Merge | None = None
    """What flowed where, by index into the tokens that came in; None where nothing did."""

    @property
    def kept(self) -> Tensor:
        """``[B, K]`` original indices of the tokens that survive in a slot of their own, ascending, -1 where padded."""
        return without(self.tokens.origin, self.merged)
