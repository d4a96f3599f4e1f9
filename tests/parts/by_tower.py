"""Golden references of methods that read the vision tower: the first stage in plain Python (`plain_tower`)."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import plain
import plain_tower

if TYPE_CHECKING:
    from parts.methods import Seen


def fastervlm(seen: Seen, keep: int) -> list[int]:
    return plain.best(seen.signals["class_attention"], keep)


def vispruner(seen: Seen, keep: int) -> list[int]:
    attention, features = seen.signals["class_attention"], seen.signals["hidden"]
    return plain_tower.vispruner(attention, features, keep, Fraction(1, 2), 8)


def vscan(seen: Seen, keep: int) -> list[int]:
    local, overall = seen.signals["class_attention@5/24"], seen.signals["class_attention"]
    return plain_tower.vscan(local, overall, [(1, *seen.grid)], 6, keep, Fraction(1, 2))


def hiprune(seen: Seen, keep: int) -> list[int]:
    middle, deep = seen.signals["received_attention@8/24"], seen.signals["received_attention"]
    return plain_tower.hiprune(middle, deep, [(1, *seen.grid)], keep, Fraction(1, 50))


def prumerge(seen: Seen, keep: int) -> list[int]:
    """As many as stand out: `keep` is not asked."""
    attention = seen.signals["class_attention@-1"]
    return plain.best(attention, max(1, plain_tower.outliers(attention)))


def prumerge_plus(seen: Seen, keep: int) -> list[int]:
    attention = seen.signals["class_attention@-1"]
    many = min(len(attention), max(1, 4 * plain_tower.outliers(attention)))
    return plain_tower.best_and_even(attention, many, Fraction(1, 4))
