"""Golden references of methods that choose after the tower: the first stage in plain Python (`plain_greedy`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plain
import plain_greedy
import plain_tower
from numpy.typing import NDArray

if TYPE_CHECKING:
    from parts.methods import Seen

Array = NDArray[np.float64]


def divprune(seen: Seen, keep: int) -> list[int]:
    return sorted(plain_greedy.max_min(seen.hidden, keep))


def otprune(seen: Seen, keep: int) -> list[int]:
    return sorted(plain_greedy.determinant(plain_greedy.otprune_kernel(seen.hidden), keep))


def mmtok(seen: Seen, keep: int) -> list[int]:
    rows = plain_greedy.mmtok_rows(seen.text, seen.hidden, seen.hidden, 0.02, 0.2, 0.5)
    return sorted(plain_greedy.facility_location(rows, keep))


def mmtok_tower(seen: Seen, keep: int) -> list[int]:
    rows = plain_greedy.mmtok_rows(seen.text, seen.hidden, seen.signals["hidden"], 0.02, 0.2, 0.5)
    return sorted(plain_greedy.facility_location(rows, keep))


def diverse(seen: Seen, keep: int) -> list[int]:
    """With a constant score the relevance is 1 throughout."""
    alike = plain_greedy.cosines(seen.hidden, seen.hidden)
    return sorted(plain_greedy.determinant((1 + 1e-6) ** 2 * alike, keep))


def cdpruner(seen: Seen, keep: int) -> list[int]:
    alike = plain_greedy.cosines(seen.hidden, seen.hidden)
    relevance = plain_greedy.cosines(seen.text, seen.hidden).mean(0)
    r = (relevance - relevance.min()) / (relevance.max() - relevance.min()) + 1e-6
    return sorted(plain_greedy.determinant(r[:, None] * alike * r, keep))


def trim(seen: Seen, keep: int) -> list[int]:
    """As many as are much more like the mean word: `keep` is not asked."""
    likeness = plain_greedy.cosines(seen.text, seen.hidden).mean(0)
    return plain.best(likeness, max(1, plain_tower.outliers(likeness)))


def eadp(seen: Seen, keep: int) -> list[int]:
    words = plain_greedy.cosines(seen.text, seen.hidden)
    entropies = [-sum(p * np.log(p) for p in plain.softmax(100 * word) if p > 0) for word in words]
    focused = sorted(range(len(words)), key=lambda t: entropies[t])[: -(-len(words) // 5)]
    weights = plain.softmax(np.array([-entropies[t] / 0.01 for t in focused]))
    dense = sum(w * words[t] for w, t in zip(weights, focused, strict=True))
    scores = np.maximum(0, 0.5 * words.mean(0) + 0.5 * dense)
    alike = (1 + plain_greedy.cosines(seen.hidden, seen.hidden)) / 2
    return sorted(plain_greedy.facility_location(alike, keep, covered=list(scores / scores.max())))
