"""Greedy selection in plain Python, every gain computed anew at every pick, from the papers' formulas, in float64.

Written apart from `tokenprune.core.greedy`, which keeps its gains up to date instead. Each returns the picks in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from plain import softmax

Array = NDArray[np.float64]


def cosine(a: Array, b: Array) -> float:
    length = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / length if length else 0.0


def cosines(x: Array, y: Array) -> Array:
    return np.array([[cosine(a, b) for b in y] for a in x]).reshape(len(x), len(y))


def one_by_one(n: int, count: int, gain: Callable[[list[int], int], float]) -> list[int]:
    """The token of highest gain, given those picked, again and again; of equals (to 1e-9) the first."""
    picked: list[int] = []
    for _ in range(count):
        gains = {c: gain(picked, c) for c in range(n) if c not in picked}
        top = max(gains.values())
        picked.append(next(c for c, g in gains.items() if g >= top - 1e-9))
    return picked


def max_min(x: Array, count: int) -> list[int]:
    """DivPrune, algorithm 1."""
    alike = cosines(x, x)

    def gain(picked: list[int], c: int) -> float:
        others = picked or [j for j in range(len(x)) if j != c]
        return min((1 - alike[c][j] for j in others), default=0.0)

    return one_by_one(len(x), count, gain)


def cover(alike: Array, picked: Sequence[int], weights: Sequence[float]) -> float:
    """Σ over the rows of w times the largest entry of the columns picked, at least 0."""
    return sum(w * max([0.0, *(row[c] for c in picked)]) for w, row in zip(weights, alike, strict=True))


def facility_location(
    alike: Array, count: int, covered: Sequence[float] | None = None, candidate: Sequence[float] | None = None
) -> list[int]:
    """SCOPE, equation of the gain, with weights on the candidate; EADP with weights on the covered; MMTok with rows."""
    rows, n = alike.shape
    w = [1.0] * rows if covered is None else covered
    v = [1.0] * n if candidate is None else candidate
    return one_by_one(n, count, lambda picked, c: v[c] * (cover(alike, [*picked, c], w) - cover(alike, picked, w)))


def determinant(kernel: Array, count: int) -> list[int]:
    """CDPruner, equation of the MAP: the token that makes the determinant of the picked kernel largest."""
    return one_by_one(
        len(kernel),
        count,
        lambda picked, c: math.log(max(1e-300, np.linalg.det(kernel[np.ix_([*picked, c], [*picked, c])]))),
    )


def suppress(scores: Sequence[float], alike: Array, threshold: float, count: int) -> list[int]:
    """GreedyPrune, algorithm 1, and what it put back in the order of the scores."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    front: list[int] = []
    for i in order:
        if all(alike[i][j] <= threshold for j in front):
            front.append(i)
    return [*front, *(i for i in order if i not in front)][:count]


def otprune_kernel(x: Array) -> Array:
    """OTPrune: I + 0.01 V Vᵀ of V = X Xᵀ, features divided by their length over the tokens."""
    columns = np.array([column / (np.sqrt(column @ column) or 1.0) for column in x.T]).T
    v = columns @ columns.T
    return np.asarray(np.eye(len(x)) + 0.01 * v @ v.T)


def mmtok_rows(
    text: Array, x: Array, shown: Array, text_temperature: float, vision_temperature: float, weight: float
) -> Array:
    """MMTok: rows of text tokens over m, then α times those of vision tokens, by what was `shown` of them, over n."""
    p = [softmax(row / text_temperature) / len(text) for row in cosines(text, x)]
    q = [weight * softmax(row / vision_temperature) / len(x) for row in cosines(shown, shown)]
    return np.array([*p, *q])


def k_means(x: Array, kept: Sequence[int], rounds: int) -> dict[int, list[int]]:
    """Spherical k-means from the survivors on, each of which stays in its own cluster: members by survivor."""
    unit = [row / np.sqrt(row @ row) for row in x]
    centres = {k: unit[k] for k in kept}
    for left in reversed(range(rounds + 1)):
        members: dict[int, list[int]] = {k: [k] for k in kept}
        for i in range(len(x)):
            if i not in members:
                members[max(kept, key=lambda k: (cosine(unit[i], centres[k]), -k))].append(i)
        if left:
            centres = {k: np.mean([unit[i] for i in own], axis=0) for k, own in members.items()}
    return members


def transport(x: Array, kept: Sequence[int], mass: Sequence[float], temperature: float, rounds: int) -> Array:
    """Sinkhorn between dropped tokens and survivors of equal room, sources settled last: parts of each, a row each."""
    dropped = [i for i in range(len(x)) if i not in kept]
    kernel = np.array([[math.exp((cosine(x[i], x[k]) - 1) / temperature) for k in kept] for i in dropped])
    a, room = np.array([mass[i] for i in dropped]), sum(mass[i] for i in dropped) / len(kept)
    u, v = np.ones(len(dropped)), np.ones(len(kept))
    for _ in range(rounds):
        u = a / (kernel @ v)
        v = room / (kernel.T @ u)
    u = a / (kernel @ v)
    return u[:, None] * kernel * v / a[:, None]
