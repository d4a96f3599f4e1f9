"""Scores from attention inside the vision tower."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.limits import TowerBlock
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.tower import signal_of
from tokenprune.parts.work import no_products


class ClassAttentionScorer(Scorer):
    """Attention that the tower's class token pays to a token, mean over the heads (VisionZip, FasterVLM, VisPruner).

    A tower without a class token gives the attention that the token receives instead, and the report says so.

    Args:
        block: of the tower, from 0, from the end below 0, or a share of its depth; null: the last that is read.
    """

    multiply_adds = no_products

    def __init__(self, *, block: TowerBlock = None) -> None:
        super().__init__()
        self.block = block
        self.check()
        self._signal = signal_of(self, "class_attention", block)

    @property
    def reads(self) -> Needs:
        return Needs(tower=self._signal)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(tokens.signal(self._signal).float())


class ReceivedAttentionScorer(Scorer):
    """Attention that a token receives from all of its picture, mean over heads and queries (HiPrune, VScan on Qwen).

    Towers without a class token have it too.

    Args:
        block: as in the scorer ``class_attention``.
    """

    multiply_adds = no_products

    def __init__(self, *, block: TowerBlock = None) -> None:
        super().__init__()
        self.block = block
        self.check()
        self._signal = signal_of(self, "received_attention", block)

    @property
    def reads(self) -> Needs:
        return Needs(tower=self._signal)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(tokens.signal(self._signal).float())
