"""Methods that read the vision tower in plain Python, one token at a time, in float64, from the papers' formulas.

Written apart from the package. Tokens are named by their place in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from plain import best
from plain_greedy import cosine

Array = NDArray[np.float64]
Grid = tuple[int, int, int]


def evenly(n: int, count: int) -> list[int]:
    """`count` of n places, as far apart as goes: where a running quota, rounded, makes a step."""
    quota = [math.floor(Fraction(i * count, n) + Fraction(1, 2)) for i in range(n + 1)]
    return [i for i in range(n) if quota[i + 1] > quota[i]]


def half_down(x: Fraction) -> int:
    return math.ceil(x - Fraction(1, 2))


def cells(grids: Sequence[Grid]) -> list[tuple[int, int, int]]:
    """Frame, row and column of every token."""
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    return [(f, r, c) for f, (h, w) in enumerate(frames) for r in range(h) for c in range(w)]


def visionzip(hidden: Array, attention: Array, keys: Array, keep: int, targets: int) -> dict[int, Array]:
    """State of every token that is left: dominant ones as they are, and contextual ones at their targets.

    `keys [N, H, d]`; targets evenly over the dropped tokens; a contextual token is its target plus the mean of those
    whose head-mean keys are most like the target's.
    """
    dominant = best(attention, keep)
    dropped = [i for i in range(len(hidden)) if i not in dominant]
    metric = [sum(keys[i]) / len(keys[i]) for i in range(len(keys))]
    chosen = [dropped[i] for i in evenly(len(dropped), targets)] if dropped else []
    joined: dict[int, list[int]] = {t: [] for t in chosen}
    for i in dropped:
        if i not in joined:
            joined[min(chosen, key=lambda t: (-round(cosine(metric[i], metric[t]), 9), t))].append(i)
    merged = {t: hidden[t] + (sum(hidden[i] for i in own) / len(own) if own else 0) for t, own in joined.items()}
    return dict(sorted({**{i: hidden[i] for i in dominant}, **merged}.items()))


def merged_into_nearest(hidden: Array, kept: Sequence[int]) -> dict[int, Array]:
    """VScan: every survivor becomes the plain mean of itself and the dropped tokens that are most like it."""
    members = {i: [i] for i in kept}
    for i in range(len(hidden)):
        if i not in members:
            members[min(kept, key=lambda t: (-round(cosine(hidden[i], hidden[t]), 9), t))].append(i)
    return {i: sum(hidden[j] for j in own) / len(own) for i, own in members.items()}


def vispruner(attention: Array, features: Array, keep: int, share: Fraction, step: int) -> list[int]:
    """The most attended, then the others thinned: of every second in a line, those most like one between them go."""
    important = half_down(share * keep)
    line = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    first, rest = line[:important], line[important:]
    while len(rest) > keep - important:
        even, odd = rest[::2], rest[1::2]
        gone = min(step, len(even), len(rest) - (keep - important))
        like = {i: max((cosine(features[i], features[j]) for j in odd), default=-2.0) for i in even}
        rest = [i for i in rest if i not in sorted(even, key=lambda i: -round(like[i], 9))[:gone]]
    return sorted(first + rest)


def vscan(
    local: Array,
    overall: Array,
    grids: Sequence[Grid],
    window: int,
    keep: int,
    share: Fraction,
    *,
    capped: bool = False,
) -> list[int]:
    """Half by an early block, window by window, and half by a late one over the whole picture.

    On LLaVA every window gives its best, as many as all can; what the half lacks are the best of those that come next
    in their windows. On Qwen (`capped`) the best of the picture are taken, unless their window has given its share.
    """
    where = [(f, r // window, c // window) for f, r, c in cells(grids)]
    first, many = half_down(share * keep), len(set(where))
    order = sorted(range(len(local)), key=lambda i: (-local[i], i))
    windows = {at: [i for i in order if where[i] == at] for at in where}
    taken: list[int] = []
    if capped:
        for i in order:
            if len(taken) < first and sum(where[j] == where[i] for j in taken) < -(-first // many):
                taken.append(i)
    else:
        each = first // many
        taken = [i for own in windows.values() for i in own[:each]]
        following = [own[each] for own in windows.values() if len(own) > each and first % many]
        taken += sorted(following, key=lambda i: (-local[i], i))[: first - len(taken)]
    others = sorted((i for i in range(len(local)) if i not in taken), key=lambda i: (-overall[i], i))
    return sorted(taken + others[: keep - len(taken)])


def hiprune(middle: Array, deep: Array, grids: Sequence[Grid], keep: int, share: Fraction) -> list[int]:
    """Anchors of the middle block, their four neighbours, and registers of the deep block up to the count."""
    at = cells(grids)
    anchors = best(middle, half_down(share * keep))
    taken = set(anchors)
    for a in anchors:
        frame, row, column = at[a]
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            taken |= {i for i, cell in enumerate(at) if cell == (frame, *near)}
    if len(taken) > keep:
        return sorted(sorted(taken, key=lambda i: (-deep[i], i))[:keep])
    registers = sorted((i for i in range(len(deep)) if i not in taken), key=lambda i: (-deep[i], i))
    return sorted([*taken, *registers[: keep - len(taken)]])


def outliers(attention: Array, factor: float = 1.5) -> int:
    """How many are above the third quartile by more than `factor` times what lies between first and third."""
    first, third = np.percentile(attention, 25), np.percentile(attention, 75)
    return sum(a > third + factor * (third - first) for a in attention)


def best_and_even(scores: Array, keep: int, share: Fraction) -> list[int]:
    """The best, and what lies evenly over the others."""
    first = best(scores, half_down(share * keep))
    others = [i for i in range(len(scores)) if i not in first]
    return sorted(first + [others[i] for i in evenly(len(others), keep - len(first))]) if others else first


def prumerge(hidden: Array, attention: Array, keys: Array, kept: Sequence[int], neighbours: int) -> dict[int, Array]:
    """Every survivor plus its nearest tokens by keys, kept or not, weighted by attention; and one token of the rest.

    `keys [N, H, d]`, compared with all heads together. The rest stands at its most attended token.
    """
    n = len(hidden)
    flat = [keys[i].ravel() for i in range(n)]
    states = {}
    for i in kept:
        others = [j for j in range(n) if j != i]
        near = sorted(others, key=lambda j: (-round(cosine(flat[i], flat[j]), 9), j))[:neighbours]
        states[i] = hidden[i] + sum(attention[j] * hidden[j] for j in near)
    dropped = [i for i in range(n) if i not in kept]
    if dropped:
        states[max(dropped, key=lambda i: (attention[i], -i))] = sum(attention[j] * hidden[j] for j in dropped)
    return dict(sorted(states.items()))
