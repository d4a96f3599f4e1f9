"""`StageReport`: what one stage did in a forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.clock import Stopwatch


@dataclass(frozen=True, eq=False)
class StageReport:
    """What one stage did in the last prefill."""

    name: str
    place: str
    layer: int | None
    """0-based layer before which it acted; None after vision, that is before layer 0."""
    left: Tensor
    """``[B, K + M]`` original indices of the tokens that the stage has left, merged ones by their anchors: the very
    tensor that the next layers run on. Ascending, -1 where padded."""
    merged: Tensor
    """``[B, M]`` original indices of the anchors whose slot now holds a merged token, -1 where padded."""
    sizes: tuple[int, ...]
    """Vision tokens of each sample after the stage, kept and merged."""
    scores: Tensor | None
    """``[B, N]`` scores of the tokens that came in; None when nothing had to be scored. Under ``pictures: apart``, NaN
    for pictures that are kept whole beside others that are not: nobody scored them."""
    scored: Tensor
    """``[B, N]`` original indices of the tokens that came in, -1 where padded."""
    watch: Stopwatch | None
    """None in a compiled forward: one graph has no clock inside."""
    kv: str = "later_layers"
    """Which caches have lost what it dropped, as the stage says it."""
    dropped: str = "leave"
    """What became of the tokens that it dropped, as the stage says it."""

    @property
    def skips(self) -> bool:
        """Whether the tokens that it dropped stayed in the sequence, and passed by the feed-forward."""
        return self.dropped == "skip_ffn"

    @property
    def kept(self) -> Tensor:
        """``[B, K]`` original indices of the tokens that survive in a slot of their own, ascending, -1 where padded."""
        return without(self.left, self.merged)

    @property
    def seconds(self) -> float:
        """Time of the method at this stage; NaN in a compiled forward."""
        return math.nan if self.watch is None else self.watch.seconds

    def select(self, rows: Sequence[int]) -> StageReport:
        """The same for `rows` of its samples."""
        index = torch.tensor(rows, device=self.left.device)
        return replace(
            self,
            left=self.left[index],
            merged=self.merged[index],
            sizes=tuple(self.sizes[row] for row in rows),
            scores=None if self.scores is None else self.scores[index],
            scored=self.scored[index],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; padding is left out."""
        return {
            "name": self.name,
            "place": self.place,
            "layer": self.layer,
            "kept": _rows(self.kept),
            "merged": _rows(self.merged),
            "tokens": list(self.sizes),
            "seconds": json_seconds(self.seconds),
            **({"dropped": self.dropped} if self.skips else {}),
        }


def without(left: Tensor, merged: Tensor) -> Tensor:
    """The entries ``[B, K]`` of `left` ``[B, N]`` that are not in `merged` ``[B, M]``; both -1 where padded, so is the
    result, on the right. K is the most of the batch."""
    if not merged.shape[1]:
        return left
    stays = (left >= 0) & ~(left.unsqueeze(2) == merged.unsqueeze(1)).any(2)
    order = (~stays).to(torch.int8).argsort(dim=1, stable=True)
    return left.masked_fill(~stays, -1).gather(1, order)[:, : int(stays.sum(1).max())]


def json_seconds(seconds: float) -> float | None:
    """Seconds as JSON has them: it has no NaN."""
    return None if math.isnan(seconds) else seconds


def _rows(index: Tensor) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in index.tolist()]
