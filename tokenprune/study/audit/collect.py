"""`Audit`: collects where each prefill kept its tokens, picture by picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.core.frames import Frame, frames_of
from tokenprune.core.grids import Grid
from tokenprune.core.report import Report
from tokenprune.core.stage_report import StageReport
from tokenprune.errors import InputError
from tokenprune.study.audit.stages import Seen, StageAudit, measure
from tokenprune.study.cases import Box
from tokenprune.study.statistics import rank_correlation


def third_of(box: Box) -> int:
    """The third of the picture that the centre of `box` lies in, an index into `THIRDS`: 0 the top, 2 the bottom."""
    _, top, _, bottom = box
    return min(int(3 * (top + bottom) / 2), 2)


@dataclass(eq=False)
class Audit:
    """Collects prefills: one picture a sample, any number of samples a batch.

    Pictures may have different grids (Qwen-VL): means are taken in the picture's own cells, heat maps and profiles are
    resampled by area to one grid, which is everybody's if all are equal and else the median height and width.
    """

    pictures: int = 0
    _seen: list[list[Seen]] = field(default_factory=list)
    _stages: list[tuple[str, str, int | None]] = field(default_factory=list)

    def add(self, report: Report, targets: Sequence[Box | None] | None = None) -> None:
        """Add the last prefill of `report` to the audit.

        Args:
            report: of an attached recipe, after a forward; it stays as it is.
            targets: the box of the thing asked for, one a sample; None where no single thing was asked for.

        Raises:
            InputError: several pictures or a video in a sample, a target outside of the picture, another number of
                targets than samples, or a report of another recipe than before.
        """
        grids = report.grids
        boxes = [None] * len(grids) if targets is None else list(targets)
        if len(boxes) != len(grids):
            raise InputError(f"audit: {len(boxes)} targets for {len(grids)} samples")
        labels = [(stage.name, stage.place, stage.layer) for stage in report.stages]
        if self._stages and labels != self._stages:
            raise InputError(f"audit: stages {labels} after stages {self._stages}; audit one recipe at a time")
        planes = [_planes(grid, number) for number, grid in enumerate(grids)]
        aims = [None if box is None else _cells(box, frames) for box, frames in zip(boxes, planes, strict=True)]
        self._stages = labels
        self._seen = self._seen or [[] for _ in labels]
        for stage, seen in zip(report.stages, self._seen, strict=True):
            for row, frames in enumerate(planes):
                box = boxes[row]
                third = 0 if box is None else third_of(box)
                seen.append(Seen(*_masks(stage, row, frames), aims[row], third, _correlation(stage, row)))
        self.pictures += len(grids)

    @property
    def stages(self) -> tuple[StageAudit, ...]:
        """One entry a stage, in order; empty as long as nothing was added."""
        return tuple(measure(label, seen) for label, seen in zip(self._stages, self._seen, strict=True))


def _planes(grids: Sequence[Grid], number: int) -> list[Frame]:
    try:
        frames = frames_of(grids, 1)
    except InputError:
        frames = []
    if not frames or any(steps != 1 for steps, _, _ in grids):
        raise InputError(f"audit: sample {number} has the grids {list(grids)}; expected one picture a sample")
    return frames


def _masks(stage: StageReport, row: int, frames: Sequence[Frame]) -> tuple[list[Any], list[Any]]:
    kept, merged = (index[row].tolist() for index in (stage.kept, stage.merged))
    return [frame.mask(kept) for frame in frames], [frame.mask(merged) for frame in frames]


def _cells(box: Box, frames: Iterable[Frame]) -> list[NDArray[np.bool_]]:
    """The cells that overlap `box`, plane by plane."""
    left, top, right, bottom = box
    if not (left < right and top < bottom and right > 0 and bottom > 0 and left < 1 and top < 1):
        raise InputError(f"audit: target {box}; expected left < right and top < bottom, as shares of the picture")
    return [frame.under(box) for frame in frames]


def _correlation(stage: StageReport, row: int) -> float | None:
    """Of the scores and raster indices of the tokens that came in; None where nothing was scored."""
    if stage.scores is None:
        return None
    index = stage.scored[row].cpu().numpy()
    scores = stage.scores[row].detach().double().cpu().numpy()
    return rank_correlation(scores[index >= 0], index[index >= 0])
