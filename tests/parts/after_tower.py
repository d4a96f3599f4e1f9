"""Golden references of methods that choose by the tower's attention and by what covers, groups or repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plain_after_tower
import plain_greedy

if TYPE_CHECKING:
    from parts.methods import Seen


def scope(seen: Seen, keep: int) -> list[int]:
    alike = plain_greedy.cosines(seen.signals["hidden"], seen.signals["hidden"])
    return sorted(plain_greedy.facility_location(alike, keep, candidate=list(seen.signals["class_attention"])))


def holov(seen: Seen, keep: int) -> list[int]:
    return plain_after_tower.holov(seen.hidden, seen.signals["class_attention"], keep, 16, 0.09)


def prunesid(seen: Seen, keep: int) -> list[int]:
    return plain_after_tower.prunesid(seen.signals["hidden"], seen.signals["class_attention"], keep, 16, 2.0)
