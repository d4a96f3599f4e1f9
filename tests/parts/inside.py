"""References for the golden lines of methods inside the vision tower: see methods.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plain
import plain_inside

if TYPE_CHECKING:
    from parts.methods import Seen


def tome(seen: Seen, keep: int) -> list[int]:
    merged = plain_inside.tome(seen.hidden, [1.0] * len(seen.hidden), len(seen.hidden) - keep)
    return sorted(merged)


def ailurus(seen: Seen, keep: int) -> list[int]:
    cells = [(0, i // seen.grid[1], i % seen.grid[1]) for i in seen.vision]
    return plain.best(plain_inside.ailurus_scores(seen.hidden, cells, 5, 50), keep)
