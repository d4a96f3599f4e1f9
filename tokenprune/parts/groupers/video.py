"""Groups for videos: frames with a budget of their own each, and scenes between cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenprune.core import transfer
from tokenprune.core.grids import Grid
from tokenprune.core.groups import Groups, rectangle, share_by
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.core.video import videos
from tokenprune.parts.groupers.base import Grouper
from tokenprune.parts.groupers.geometric import GeometricGrouper, blocks
from tokenprune.parts.work import no_products

Temperature = Annotated[float, Field(gt=0, le=1000)]
"""Of a softmax; higher makes shares more equal."""
_PRECISION = 1e6
"""Statistics are rounded to a millionth, so that the order of summation does not decide between equal frames."""


class FrameGrouper(GeometricGrouper):
    """A group for each frame of each video, or for each image.

    What a frame is due may depend on what it shows: the host then waits for the device once at the stage. Pictures of
    one size that follow each other count as frames of a video.

    Args:
        by: frames are due in proportion to their ``size``; to size times 1 + p - mean p, where p is the softmax of
            their mean ``score`` (VidCom²); or to size times the softmax of the ``curvature`` of the path of frame
            means, which is high where the video turns (V-CAST).
        temperature: of the softmax; higher makes shares more equal.
        whole: every so many frames, one is served in full before the others get anything (DyCoke: 4); null: none is.
    """

    def __init__(
        self,
        *,
        by: Literal["size", "score", "curvature"] = "size",
        temperature: Temperature = 1.0,
        whole: Annotated[int, Field(ge=2, le=4096)] | None = None,
    ) -> None:
        super().__init__()
        self.by = by
        self.temperature = temperature
        self.whole = whole
        self.check()

    @property
    def static(self) -> bool:
        return self.by == "size"

    def split(self, grid: Grid) -> tuple[NDArray[np.int64], list[Grid]]:
        return blocks(grid, (1, grid[1], grid[2]))

    def forward(self, tokens: Tokens) -> Groups:
        groups = super().forward(tokens)
        if self.by == "curvature":
            means = group_means(tokens.hidden.float(), groups).cpu().double().numpy()
            due = [
                _softmax(np.concatenate([curvature(part) for part in _parts(row, grids)]), self.temperature).tolist()
                if grids
                else []
                for row, grids in zip(means, tokens.grids, strict=True)
            ]
            return self._due(groups, tokens, due)
        if self.whole is not None:
            return self._due(groups, tokens, [[1.0] * len(own) for own in groups.sizes])
        return groups

    def share(self, groups: Groups, counts: Sequence[int], scores: Tensor) -> tuple[tuple[int, ...], ...]:
        if self.by != "score":
            return super().share(groups, counts, scores)
        finite = scores.masked_fill(groups.index < 0, 0.0)
        means = group_means(finite.unsqueeze(-1), groups).squeeze(-1).cpu().double().numpy()
        shares = []
        for row, sizes, count in zip(means, groups.sizes, counts, strict=True):
            p = _softmax(row[: len(sizes)], self.temperature)
            due = np.array(sizes) * (1 + p - p.mean()) if len(sizes) else p
            shares.append(tuple(share_by(count, sizes, due.tolist())))
        return tuple(shares)

    def _due(self, groups: Groups, tokens: Tokens, factors: Sequence[Sequence[float]]) -> Groups:
        """Groups whose weights are size times factor; those of whole frames far above all others."""
        weights = []
        for sizes, grids, factor in zip(groups.sizes, tokens.grids, factors, strict=True):
            frames = [frame for video in videos(grids) for frame in range(video.frames)]
            first = [1e6 if self.whole is not None and frame % self.whole == 0 else 1.0 for frame in frames]
            weights.append(tuple(size * by * more for size, by, more in zip(sizes, factor, first, strict=True)))
        return replace(groups, weights=tuple(weights))


class SceneGrouper(Grouper):
    """Stretches of a video between cuts, which are where the means of neighbouring frames are least alike (FastVID).

    Cuts are at the lowest cosines, and wherever the cosine is below a threshold. The host waits for the device once at
    the stage. Pictures of one size that follow each other count as frames of a video; others are scenes of their own.

    Args:
        cuts: so many cuts in each video at least, as far as it has frames; higher gives more, shorter scenes.
        below: also where the cosine is lower than this; higher cuts more often, 0 at no place more.
    """

    reads = Needs(grid=True)
    multiply_adds = no_products

    def __init__(
        self,
        *,
        cuts: Annotated[int, Field(ge=0, le=1024)] = 7,
        below: Annotated[float, Field(ge=0, le=1)] = 0.9,
    ) -> None:
        super().__init__()
        self.cuts = cuts
        self.below = below
        self.check()

    @property
    def static(self) -> bool:
        return False

    def forward(self, tokens: Tokens) -> Groups:
        frames = FrameGrouper()(tokens)
        means = group_means(tokens.hidden.float(), frames).cpu().double().numpy()
        index = frames.index.clone()
        numbers, sizes, grids = [], [], []
        most = max(map(len, frames.sizes), default=0)
        for row, own, pictures in zip(means, frames.sizes, tokens.grids, strict=True):
            scene: list[int] = []
            shapes: list[Grid] = []
            for video, part in zip(videos(pictures), _parts(row, pictures), strict=True):
                edges = [0, *cuts(part, self.cuts, self.below), video.frames]
                for first, last in pairwise(edges):
                    scene += [len(shapes)] * (last - first)
                    shapes.append((last - first, video.rows, video.columns))
            counted = [0] * len(shapes)
            for number, size in zip(scene, own, strict=True):
                counted[number] += size
            numbers.append(scene + [0] * (most - len(scene)))
            sizes.append(tuple(counted))
            grids.append(tuple(rectangle(size, grid) for size, grid in zip(counted, shapes, strict=True)))
        table = transfer.upload(torch.tensor(numbers, dtype=torch.int64).view(len(numbers), most), index.device)
        scenes = table.gather(1, index.clamp(min=0)) if most else index
        return Groups(scenes.masked_fill(index < 0, -1), tuple(sizes), tuple(grids))


def group_means(x: Tensor, groups: Groups) -> Tensor:
    """Mean ``[B, G, C]`` of the tokens of each group, from ``[B, N, C]`` float32; 0 where a group is empty."""
    many = max(1, max(map(len, groups.sizes), default=0))
    member = (groups.index.unsqueeze(1) == torch.arange(many, device=x.device).unsqueeze(-1)).float()
    total = member @ x.where(groups.index.unsqueeze(-1) >= 0, 0.0)
    return total / member.sum(-1, keepdim=True).clamp(min=1)


def curvature(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """One minus the cosine between the step to each point of a path ``[T, D]`` and the step from it; 1 at both ends."""
    steps = np.diff(path, axis=0)
    bent = np.ones(len(path))
    for i in range(1, len(path) - 1):
        bent[i] = 1 - _cosine(steps[i - 1], steps[i])
    return bent


def cuts(means: NDArray[np.float64], number: int, below: float) -> list[int]:
    """First frames of all scenes but the first, from frame means ``[T, D]``: see `SceneGrouper`."""
    alike = [round(_cosine(a, b) * _PRECISION) for a, b in pairwise(means)]
    lowest = sorted(range(len(alike)), key=lambda i: (alike[i], i))[:number]
    return sorted({i + 1 for i in lowest} | {i + 1 for i, each in enumerate(alike) if each < below * _PRECISION})


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 1e-12 else 0.0


def _softmax(x: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    rounded = np.round(x * _PRECISION) / _PRECISION
    e = np.exp((rounded - rounded.max(initial=-np.inf)) / temperature) if len(x) else rounded
    return np.asarray(e / e.sum() if len(x) else e)


def _parts(rows: NDArray[np.float64], grids: Sequence[Grid]) -> list[NDArray[np.float64]]:
    """The frames' rows of each video of a sample."""
    edges = np.cumsum([0, *(video.frames for video in videos(grids))])
    return [rows[a:b] for a, b in pairwise(edges)]
