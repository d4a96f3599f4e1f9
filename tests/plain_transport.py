"""TopV in plain Python: costs pair by pair, a plan target by target, in float64, from the paper's formulas, mended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from plain import softmax

Array = NDArray[np.float64]


def to_one(x: Array) -> Array:
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)


def transport(
    before: Array,
    now: Array,
    grids: Sequence[tuple[int, int, int]],
    weights: tuple[float, float, float] = (1.0, 1.0, 0.01),
    spread: float = 10.0,
    temperature: float = 0.1,
) -> list[float]:
    """What is asked of each token, mean over the targets: what the layer has added to each of `before [N, D]`."""
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    at = [(f, r, c) for f, (h, w) in enumerate(frames) for r in range(h) for c in range(w)]
    n = len(before)
    features, places, centre = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
    for i, (frame, row, column) in enumerate(at):
        height, width = frames[frame]
        for j, (other, below, right) in enumerate(at):
            features[i, j] = ((before[i] - (now[j] - before[j])) ** 2).sum()
            squared = (row - below) ** 2 + (column - right) ** 2
            places[i, j] = 1 - np.exp(-squared / (2 * spread**2)) if frame == other else 1.0
            centre[i, j] = np.hypot(row - (height - 1) / 2, column - (width - 1) / 2)
    cost = weights[0] * to_one(features) + weights[1] * to_one(places) + weights[2] * to_one(centre)
    asked = [softmax(-cost[:, j] / temperature) for j in range(n)]
    return [float(np.mean([row[i] for row in asked])) for i in range(n)]
