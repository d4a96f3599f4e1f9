"""Scores for videos: what is new in a frame, and what stands out from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.grids import Grid
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.core.video import earlier_tokens
from tokenprune.parts.limits import Share
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work, no_products

_FORCED = 4.0
"""Above every difference of cosines, so that frames which are compared with none come first."""
_WIDTHS = tuple(2.0**power for power in range(-3, 2))
"""Widths of the Gaussians of VidCom²."""


class TemporalChangeScorer(Scorer):
    """One minus the cosine between a token and the one at its place in an earlier frame (EVS, DyCoke).

    Tokens of a frame that is compared with none come first, in an order that looks random, as do tokens whose earlier
    one is gone. Pictures of one size that follow each other count as frames of a video.

    Args:
        run: null compares each frame with the one before (EVS); a number compares within runs of so many frames, by
            halving steps: of four, 1 with 0, 2 with 0 and 3 with 2 (DyCoke).
    """

    reads = Needs(grid=True)
    multiply_adds = no_products

    def __init__(self, *, run: Annotated[int, Field(ge=2, le=64)] | None = None) -> None:
        super().__init__()
        self.run = run
        self.check()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        table = earlier_table(tokens.grids, self.run)
        earlier = transfer.upload(table, tokens.valid.device).gather(1, tokens.origin.clamp(min=0))
        index = torch.arange(tokens.valid.shape[1], device=tokens.valid.device)
        where = torch.full((len(table), table.shape[1]), -1, device=tokens.valid.device)
        where = ops.put_(where, tokens.origin.clamp(min=0), index.expand_as(tokens.origin), tokens.valid)
        at = where.gather(1, earlier.clamp(min=0))
        unit = torch.nn.functional.normalize(tokens.hidden.float(), dim=-1)
        alike = (unit * ops.take_rows(unit, at.clamp(min=0))).sum(-1)
        first = (earlier < 0) | (at < 0)
        return tokens.only_valid(torch.where(first, _FORCED + ops.hashed(tokens.origin, 0), 1 - alike))


# In a compiled model the table of a picture is a constant, like a plan: one graph a shape.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def earlier_table(grids: tuple[tuple[Grid, ...], ...], run: int | None) -> Tensor:
    """`earlier_tokens` of each sample, ``[B, M]``, -1 padded; M at least 1."""
    return _padded([earlier_tokens(own, run) for own in grids])


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    most = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[-1] * (most - len(row))] for row in rows], dtype=torch.int64)


class OutlierScorer(Scorer):
    """How far a token is from the mean of its frame, or of frame and video: what is common is told by few tokens.

    VidCom² (``gaussian``, ``both``, half of the channels) and V-CAST (``cosine``, ``frame``, all of them, ``norm``).

    Args:
        centre: compared with the mean of the ``frame``, or with that and the mean of the whole video, summed: ``both``.
        measure: minus the sum of ``gaussian`` similarities of five widths, of tokens of length 1; or one minus the
            ``cosine``.
        channels: share of the channels that are looked at, those that vary least over the video; higher looks at more.
        norm: add the length of the token, scaled to 0 … 1 over the video.
    """

    reads = Needs(grid=True)

    def __init__(
        self,
        *,
        centre: Literal["frame", "both"] = "both",
        measure: Literal["gaussian", "cosine"] = "gaussian",
        channels: Share = 0.5,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.centre = centre
        self.measure = measure
        self.channels = channels
        self.norm = norm
        self.check()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        valid = tokens.valid.unsqueeze(-1)
        x = tokens.hidden.float().where(valid, 0.0)
        length = x.norm(dim=-1)
        x = x / length.clamp(min=1e-12).unsqueeze(-1) if self.measure == "gaussian" else x
        x = self._channels(x, valid)
        away = self._away(x, frame_means(x, tokens).where(valid, 0.0))
        if self.centre == "both":
            away = away + self._away(x, _mean(x, valid))
        if self.norm:
            low = length.masked_fill(~tokens.valid, torch.inf).amin(1, keepdim=True) if length.shape[1] else 0.0
            high = length.amax(1, keepdim=True) if length.shape[1] else 0.0
            away = away + (length - low) / (high - low + torch.finfo(torch.float32).tiny)
        return tokens.only_valid(away)

    def multiply_adds(self, work: Work) -> int:
        return 2 * work.tokens * work.width  # means are sums; each token is compared with one or two of them

    def _channels(self, x: Tensor, valid: Tensor) -> Tensor:
        """The channels ``[B, N, C]`` that vary least, 0 on padding."""
        number = max(1, int(self.channels * x.shape[-1]))
        if number == x.shape[-1]:
            return x
        spread = (x - _mean(x, valid)).where(valid, 0.0).square().sum(1)
        least = ops.top_k(-spread, [number] * x.shape[0])
        return x.gather(2, least.unsqueeze(1).expand(-1, x.shape[1], -1))

    def _away(self, x: Tensor, centre: Tensor) -> Tensor:
        if self.measure == "cosine":
            return 1 - torch.cosine_similarity(x, centre, dim=-1)
        apart = (x - centre).square().sum(-1)
        return -torch.stack([(-apart / (2 * width)).exp() for width in _WIDTHS]).sum(0)


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean ``[B, 1, C]`` over the valid tokens of ``[B, N, C]``, which are 0 elsewhere."""
    return x.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def frame_means(x: Tensor, tokens: Tokens) -> Tensor:
    """Mean ``[B, N, C]`` of the tokens in each token's frame, from ``[B, N, C]``, which is 0 on padding."""
    frame = tokens.cell[..., 0].where(tokens.valid, 0)
    many = max([sum(grid[0] for grid in grids) for grids in tokens.grids], default=0)
    member = (frame.unsqueeze(1) == torch.arange(max(1, many), device=frame.device).unsqueeze(-1)).float()
    member = member * tokens.valid.unsqueeze(1)
    means = (member @ x) / member.sum(-1, keepdim=True).clamp(min=1)
    return ops.take_rows(means, frame)
