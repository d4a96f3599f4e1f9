"""Where in the picture a recipe keeps its tokens: the position bias of each stage, over many prefills.

Feed an `Audit` with the reports of an attached recipe, then read `Audit.stages`. It needs nothing but reports, so it
works on any supported model. Measures are those of FEATHER (arXiv:2412.13180, section 3): a heat map of how often each
place is kept, the mean height of what is kept, and a chi-square statistic of the rows. Of that only the effect size is
given, no p-value: tokens of one picture are not independent, and with many pictures any p is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputError
from tokenprune.plot import Frame, frames_of
from tokenprune.report import Report, StageReport
from tokenprune.tokens import Grid

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a target, as shares of the picture's sides (0 to 1)."""

FEWEST = 8
"""Pictures that a bootstrap needs: of fewer it says more than they know."""
THIRDS = ("top", "middle", "bottom")
DRAWS = 1000
"""Bootstrap samples of pictures behind a 95 % interval; their seed is fixed."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval over pictures; the ends are None where too few were seen to tell."""

    value: float
    low: float | None
    high: float | None

    def above(self, other: float) -> bool:
        """Whether the whole interval lies above `other`."""
        return self.low is not None and self.low > other

    def below(self, other: float) -> bool:
        """Whether the whole interval lies below `other`."""
        return self.high is not None and self.high < other


@dataclass(frozen=True)
class Axis:
    """The kept tokens along one axis of the picture: its rows (0 top, 1 bottom) or its columns (0 left, 1 right)."""

    mean: Estimate | None
    """Mean place of the kept tokens: that of (row + 1/2) / rows; 0.5 when they lie evenly. None when none was kept."""
    bias: Estimate | None
    """(mean - 1/2) / (1/2 · (1 - keep share)): 0 even, 1 exactly the last rows, -1 exactly the first ones. None when
    all or none were kept."""
    thirds: tuple[float, float, float]
    """Share of the kept tokens in each third of the picture, in order; a third each when they lie evenly."""
    profile: tuple[float, ...]
    """Share of the tokens of each row (column) that was kept."""
    chi_square: float
    """Of the kept tokens' rows against even ones, with ``degrees`` of freedom; it grows with the pictures seen."""
    degrees: int
    cramers_v: float
    """sqrt(chi_square / (kept · degrees)): 0 all rows alike, 1 a single row. It does not grow with the pictures."""
    cramers_v_most: float
    """The largest V that so many kept tokens can have, as a row holds no more than its tokens."""


@dataclass(frozen=True)
class Recall:
    """Share of a target's tokens that a stage left as they are, mean over the targets."""

    share: Estimate | None
    targets: int


@dataclass(frozen=True, eq=False)
class StageAudit:
    """What one stage kept, over all pictures. Anchors of merged tokens are counted by themselves, not as kept."""

    name: str
    place: str
    layer: int | None
    """0-based layer before which it acts; None after vision."""
    pictures: int
    tokens: float
    """Original vision tokens, mean over pictures (without separators at row ends, which belong to no place)."""
    kept: float
    merged: float
    keep: float
    """Kept share of the original tokens: what every place would show if position had no say."""
    heat: Array
    """``[H, W]`` how often the tokens at each place were kept, 0 to 1."""
    heat_merged: Array
    """``[H, W]`` the same for anchors of merged tokens."""
    rows: Axis
    columns: Axis
    recall: dict[str, Recall]
    """By where the target's centre lies: ``all``, ``top``, ``middle``, ``bottom``; empty when no target was given."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        facts = {key: value for key, value in vars(self).items() if not key.startswith("heat")}
        for key in ("rows", "columns"):
            facts[key] = asdict(facts[key])
        facts["recall"] = {key: asdict(value) for key, value in self.recall.items()}
        return facts | {"heat": self.heat.round(6).tolist(), "heat_merged": self.heat_merged.round(6).tolist()}


@dataclass(eq=False)
class _Seen:
    """One picture at one stage: per plane (overview, tiles) ``[h, w]`` bool masks."""

    kept: list[NDArray[np.bool_]]
    merged: list[NDArray[np.bool_]]
    target: list[NDArray[np.bool_]] | None
    third: int


@dataclass(eq=False)
class Audit:
    """Collects prefills: one picture a sample, any number of samples a batch.

    Pictures may have different grids (Qwen-VL): means are taken in the picture's own cells, heat maps and profiles are
    resampled by area to one grid, which is everybody's if all are equal and else the median height and width.
    """

    pictures: int = 0
    _seen: list[list[_Seen]] = field(default_factory=list)
    _stages: list[tuple[str, str, int | None]] = field(default_factory=list)

    def add(self, report: Report, targets: Sequence[Box | None] | None = None) -> None:
        """Take in the last prefill of `report`.

        Args:
            report: of an attached recipe, after a forward; it stays as it is.
            targets: per sample where that lies which was asked for; None where nothing single was.

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
                third = 0 if box is None else min(int(3 * (box[1] + box[3]) / 2), 2)
                seen.append(_Seen(*_masks(stage, row, frames), aims[row], third))
        self.pictures += len(grids)

    @property
    def stages(self) -> tuple[StageAudit, ...]:
        """One entry a stage, in order; empty as long as nothing was added."""
        return tuple(_audit(label, seen) for label, seen in zip(self._stages, self._seen, strict=True))


def share(count: int, total: int) -> Estimate:
    """`count` of `total` with Wilson's 95 % interval (Wilson 1927), which also holds near 0 and 1; total is not 0."""
    z2, p = 1.959964**2, count / total
    middle, spread = p + z2 / (2 * total), (z2 * (p * (1 - p) + z2 / (4 * total)) / total) ** 0.5
    return Estimate(p, max(0.0, (middle - spread) / (1 + z2 / total)), min(1.0, (middle + spread) / (1 + z2 / total)))


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
    found = []
    for frame in frames:
        y, x = np.arange(frame.height), np.arange(frame.width)
        rows = (y < bottom * frame.height) & (y + 1 > top * frame.height)
        found.append(rows[:, None] & ((x < right * frame.width) & (x + 1 > left * frame.width)))
    return found


def _audit(label: tuple[str, str, int | None], seen: Sequence[_Seen]) -> StageAudit:
    shapes = [mask.shape for item in seen for mask in item.kept]
    height, width = (int(np.median([shape[axis] for shape in shapes])) for axis in (0, 1))
    everything = _total((np.ones(shape) for shape in shapes), height, width)
    kept = _total((mask for item in seen for mask in item.kept), height, width)
    merged = _total((mask for item in seen for mask in item.merged), height, width)
    tokens = sum(mask.size for item in seen for mask in item.kept)
    count = sum(int(mask.sum()) for item in seen for mask in item.kept)
    anchors = sum(int(mask.sum()) for item in seen for mask in item.merged)
    return StageAudit(
        *label,
        pictures=len(seen),
        tokens=tokens / len(seen),
        kept=count / len(seen),
        merged=anchors / len(seen),
        keep=count / tokens,
        heat=kept / everything,
        heat_merged=merged / everything,
        rows=_axis(seen, 0, kept, everything),
        columns=_axis(seen, 1, kept, everything),
        recall=_recall(seen),
    )


def _axis(seen: Sequence[_Seen], axis: int, kept: Array, everything: Array) -> Axis:
    sums = np.array([_moments(item.kept, axis) for item in seen])
    tokens, count, _ = sums.sum(0)
    along, room = kept.sum(1 - axis), everything.sum(1 - axis)
    thirds = _overlap(3, len(along)) @ along / max(count, 1)
    chi_square, v = _uneven(along)
    full, rest = divmod(count, room[0])  # the most uneven way to place them: full rows, then the rest in one more
    steepest = np.zeros_like(along)
    steepest[: int(full)] = room[0]
    steepest[min(int(full), len(along) - 1)] += rest
    return Axis(
        mean=_estimate(sums, lambda s: s[..., 2] / s[..., 1]) if count else None,
        bias=_estimate(sums, _bias) if 0 < count < tokens else None,
        thirds=(float(thirds[0]), float(thirds[1]), float(thirds[2])),
        profile=tuple((along / room).tolist()),
        chi_square=chi_square,
        degrees=len(along) - 1,
        cramers_v=v,
        cramers_v_most=_uneven(steepest)[1],
    )


def _moments(masks: Iterable[NDArray[np.bool_]], axis: int) -> tuple[float, float, float]:
    """Tokens, kept ones, and the sum of the kept ones' places along the axis."""
    tokens, count, places = 0.0, 0.0, 0.0
    for mask in masks:
        along = mask.sum(1 - axis)
        tokens, count = tokens + mask.size, count + along.sum()
        places += float(along @ ((np.arange(len(along)) + 0.5) / len(along)))
    return tokens, count, places


def _bias(sums: Array) -> Array:
    tokens, count, places = (sums[..., column] for column in range(3))
    return (places / count - 0.5) / (0.5 * (1 - count / tokens))


def _uneven(along: Array) -> tuple[float, float]:
    """Chi-square of counts against equal ones, and Cramér's V of it."""
    count, degrees = along.sum(), len(along) - 1
    if not count or not degrees:
        return 0.0, 0.0
    chi_square = float(((along - count / len(along)) ** 2).sum() * len(along) / count)
    return chi_square, (chi_square / (float(count) * degrees)) ** 0.5


def _recall(seen: Sequence[_Seen]) -> dict[str, Recall]:
    shares: list[list[float]] = [[], [], []]
    for item in seen:
        if item.target is not None:
            hit = sum(int((k & t).sum()) for k, t in zip(item.kept, item.target, strict=True))
            shares[item.third].append(hit / sum(int(t.sum()) for t in item.target))
    groups = {"all": [each for group in shares for each in group], **dict(zip(THIRDS, shares, strict=True))}
    if not groups["all"]:
        return {}
    return {
        name: Recall(_estimate(np.array(group)[:, None], lambda s: s[..., 0]) if group else None, len(group))
        for name, group in groups.items()
    }


def _estimate(each: Array, of: Callable[[Array], Array]) -> Estimate:
    """`of` the means of the columns of ``[pictures, C]``, with a percentile bootstrap over pictures."""
    value = float(of(each.mean(0)))
    if len(each) < FEWEST:
        return Estimate(value, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = of(_weights(len(each)) @ each)
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
    return Estimate(value, min(float(low), value), max(float(high), value))


@lru_cache(maxsize=8)
def _weights(pictures: int) -> Array:
    """``[DRAWS, pictures]``: how often each picture is drawn, over their number."""
    counts = np.random.default_rng(0).multinomial(pictures, np.full(pictures, 1 / pictures), size=DRAWS)
    return counts / pictures


def _total(masks: Iterable[NDArray[Any]], height: int, width: int) -> Array:
    """Sum of masks ``[h, w]``, each resampled by area to ``[height, width]``; what they add up to stays."""
    total = np.zeros((height, width))
    for mask in masks:
        total += _overlap(height, mask.shape[0]) @ mask @ _overlap(width, mask.shape[1]).T
    return total


@lru_cache(maxsize=256)
def _overlap(new: int, old: int) -> Array:
    """``[new, old]``: share of each of `old` equal intervals that lies in each of `new` ones; columns sum to 1."""
    i, j = np.arange(new)[:, None], np.arange(old)[None, :]
    inside = np.minimum((i + 1) * old, (j + 1) * new) - np.maximum(i * old, j * new)
    return np.clip(inside, 0, None) / new
