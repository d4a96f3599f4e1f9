"""What the kept tokens of one stage say about position, over all pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.study.audit.resample import overlap, total
from tokenprune.study.statistics import Array, Estimate, over_pictures, uneven

THIRDS = ("top", "middle", "bottom")


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
    score_position: Estimate | None
    """Spearman's rank correlation of score and raster index (0 is the first token), mean over pictures: 1 when later
    tokens always score higher. None where nothing was scored, or all scores were equal."""
    recall: dict[str, Recall]
    """By where the target's centre lies: ``all``, ``top``, ``middle``, ``bottom``; empty when no target was given."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        facts = {key: value for key, value in vars(self).items() if not key.startswith("heat")}
        for key in ("rows", "columns"):
            facts[key] = asdict(facts[key])
        facts["score_position"] = None if self.score_position is None else self.score_position.to_dict()
        facts["recall"] = {key: asdict(value) for key, value in self.recall.items()}
        return facts | {"heat": self.heat.round(6).tolist(), "heat_merged": self.heat_merged.round(6).tolist()}


@dataclass(eq=False)
class Seen:
    """One picture at one stage: per plane (overview, tiles) ``[h, w]`` bool masks."""

    kept: list[NDArray[np.bool_]]
    merged: list[NDArray[np.bool_]]
    target: list[NDArray[np.bool_]] | None
    third: int
    correlation: float | None
    """Of scores and raster indices."""


def measure(label: tuple[str, str, int | None], seen: Sequence[Seen]) -> StageAudit:
    shapes = [mask.shape for item in seen for mask in item.kept]
    height, width = (int(np.median([shape[axis] for shape in shapes])) for axis in (0, 1))
    everything = total((np.ones(shape) for shape in shapes), height, width)
    kept = total((mask for item in seen for mask in item.kept), height, width)
    merged = total((mask for item in seen for mask in item.merged), height, width)
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
        score_position=_correlation(seen),
        recall=_recall(seen),
    )


def _axis(seen: Sequence[Seen], axis: int, kept: Array, everything: Array) -> Axis:
    sums = np.array([_moments(item.kept, axis) for item in seen])
    tokens, count, _ = sums.sum(0)
    along, room = kept.sum(1 - axis), everything.sum(1 - axis)
    thirds = overlap(3, len(along)) @ along / max(count, 1)
    chi_square, v = uneven(along)
    full, rest = divmod(count, room[0])  # the most uneven way to place them: full rows, then the rest in one more
    steepest = np.zeros_like(along)
    steepest[: int(full)] = room[0]
    steepest[min(int(full), len(along) - 1)] += rest
    return Axis(
        mean=over_pictures(sums, lambda s: s[..., 2] / s[..., 1]) if count else None,
        bias=over_pictures(sums, _bias) if 0 < count < tokens else None,
        thirds=(float(thirds[0]), float(thirds[1]), float(thirds[2])),
        profile=tuple((along / room).tolist()),
        chi_square=chi_square,
        degrees=len(along) - 1,
        cramers_v=v,
        cramers_v_most=uneven(steepest)[1],
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


def _recall(seen: Sequence[Seen]) -> dict[str, Recall]:
    shares: list[list[float]] = [[], [], []]
    for item in seen:
        if item.target is not None:
            hit = sum(int((k & t).sum()) for k, t in zip(item.kept, item.target, strict=True))
            shares[item.third].append(hit / sum(int(t.sum()) for t in item.target))
    groups = {"all": [each for group in shares for each in group], **dict(zip(THIRDS, shares, strict=True))}
    if not groups["all"]:
        return {}
    return {
        name: Recall(over_pictures(np.array(group)[:, None], lambda s: s[..., 0]) if group else None, len(group))
        for name, group in groups.items()
    }


def _correlation(seen: Sequence[Seen]) -> Estimate | None:
    known = [item.correlation for item in seen if item.correlation is not None]
    return over_pictures(np.array(known)[:, None], lambda s: s[..., 0]) if known else None
