"""Methods that choose by the tower's attention, in plain Python: loops, apart from the package (see plain.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from plain import best
from plain_greedy import cosine, cosines, suppress
from plain_layers import shares

Array = NDArray[np.float64]


def variety(x: Array) -> float:
    """Mean over tokens of the variance of their cosines with the others."""
    found = []
    for i, a in enumerate(x):
        alike = [cosine(a, b) for j, b in enumerate(x) if j != i]
        found.append(float(np.var(alike)) if alike else 0.0)
    return float(np.mean(found))


def holov(x: Array, attention: Sequence[float], count: int, parts: int, alpha: float) -> list[int]:
    """HoloV, variety relative to the picture's: budgets of stretches by attention + α · variety, the best in each."""
    n = len(x)
    lengths = [n // parts + (part < n % parts) for part in range(parts)]
    starts = [sum(lengths[:part]) for part in range(parts)]
    crops = [range(start, start + length) for start, length in zip(starts, lengths, strict=True) if length]
    varied = [variety(x[list(crop)]) for crop in crops]
    usual = sum(v * len(crop) for v, crop in zip(varied, crops, strict=True)) / n
    due = []
    for crop, v in zip(crops, varied, strict=True):
        looked = np.mean([attention[i] for i in crop]) / np.mean(attention)
        due.append(len(crop) * round(float(looked + (alpha * v / usual if usual else 0.0)), 6))
    counts = shares(count, [len(crop) for crop in crops], due)
    return [crop[i] for crop, own in zip(crops, counts, strict=True) for i in best([attention[i] for i in crop], own)]


def patterns(x: Array, components: int) -> list[int]:
    """PruneSID: of the principal components of sigmoid features, tokens as variables, that with the largest loading."""
    channels = (1 / (1 + np.exp(-x))).T
    channels = channels - channels.mean(0)
    _, lengths, rows = np.linalg.svd(channels, full_matrices=False)
    real = [row for row, length in zip(rows, lengths, strict=True) if length > 1e-6 * lengths[0]][:components]
    return [max(range(len(real)), key=lambda k: (abs(real[k][i]), -k)) for i in range(len(x))]


def prunesid(x: Array, attention: Sequence[float], count: int, components: int, factor: float) -> list[int]:
    """Shares of the groups by size; in each, suppression above so many times the mean cosine of different tokens."""
    group = patterns(x, components)
    members = [[i for i, g in enumerate(group) if g == number] for number in range(max(group) + 1)]
    sizes = [len(own) for own in members]
    kept: list[int] = []
    for own, share in zip(members, shares(count, sizes, [float(size) for size in sizes]), strict=True):
        alike = cosines(x[own], x[own])
        others = [alike[a][b] for a in range(len(own)) for b in range(len(own)) if a != b]
        threshold = factor * float(np.mean(others)) if others else 0.0
        kept += [own[i] for i in suppress([attention[i] for i in own], alike, threshold, share)]
    return sorted(kept)
