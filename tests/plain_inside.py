"""Methods that act inside a vision tower, in plain Python: simple loops, apart from the package (see plain.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from plain_greedy import cosine

Array = NDArray[np.float64]
Cell = tuple[int, int, int]
"""Frame, row, column."""


def nearness(cells: Sequence[Cell], window: int) -> list[list[float]]:
    """AiluRus: s(i, j), (1 - α) · rank / λ + α for the λ tokens nearest to i on its picture, else infinite; α = 0.5."""
    out = []
    for one in cells:
        here = [j for j, other in enumerate(cells) if other[0] == one[0]]
        far = {j: (cells[j][1] - one[1]) ** 2 + (cells[j][2] - one[2]) ** 2 for j in here}
        ranks = {j: rank for rank, j in enumerate(sorted(here, key=lambda j: (far[j], j)))}
        out.append(
            [0.5 + 0.5 * ranks[j] / window if j in ranks and ranks[j] < window else np.inf for j in range(len(cells))]
        )
    return out


def ailurus_scores(x: Array, cells: Sequence[Cell], neighbours: int, window: int) -> list[float]:
    """log(ρ δ): density among the nearest of the surroundings, and distance to the nearest denser token anywhere."""
    n, near = len(x), nearness(cells, window)
    apart = [[float(np.linalg.norm(a - b)) / x.shape[1] ** 0.5 for b in x] for a in x]
    density = []
    for i in range(n):
        weighed = sorted(apart[i][j] * near[i][j] for j in range(n) if near[i][j] < np.inf)[:neighbours]
        density.append(-sum(d**2 for d in weighed) / len(weighed))
    out = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        separation = min(apart[i][j] for j in denser) if denser else max(apart[i])
        out.append(density[i] + np.log(separation) if separation > 0 else -np.inf)
    return out


def ailurus_merge(x: Array, cells: Sequence[Cell], kept: Sequence[int], window: int) -> dict[int, Array]:
    """Each joins the representative of smallest distance times nearness, anywhere if none is near; plain means."""
    near = nearness(cells, window)
    joined: dict[int, list[int]] = {k: [k] for k in kept}
    for i in range(len(x)):
        if i in joined:
            continue
        chord = {k: (max(0.0, 2 - 2 * cosine(x[i], x[k]))) ** 0.5 for k in kept}
        around = [k for k in kept if near[i][k] < np.inf]
        target = min(around or kept, key=lambda k: (chord[k] * (near[i][k] if around else 1), k))
        joined[target].append(i)
    return {k: x[members].mean(0) for k, members in joined.items()}


def tome(x: Array, sizes: Sequence[float], r: int) -> dict[int, tuple[Array, float]]:
    """ToMe: of even and odd places, the `r` even tokens most like an odd one are added to it, weighted by their sizes.

    What is left, by place: its state and its size.
    """
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    partner = {a: max(odd, key=lambda b: (round(cosine(x[a], x[b]), 9), -b)) for a in even if odd}
    goes = sorted(partner, key=lambda a: (-round(cosine(x[a], x[partner[a]]), 9), -a))[:r]
    groups = {i: [i] for i in range(len(x)) if i not in goes}
    for a in goes:
        groups[partner[a]].append(a)
    total = {i: sum(sizes[j] for j in group) for i, group in groups.items()}
    return {i: (sum(sizes[j] * x[j] for j in group) / total[i], total[i]) for i, group in groups.items()}
