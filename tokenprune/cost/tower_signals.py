"""`signal_cost`: what reading a signal of the vision tower costs, in multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tokenprune.core.grids import Grid
from tokenprune.core.needs import parse_tower_signal
from tokenprune.cost.shape import VisionShape


def signal_cost(vision: VisionShape, name: str, total: int, grids: Sequence[Grid]) -> int | None:
    """Products of queries and keys that the engine forms once more; None where the tower's pairs are not known.

    Keys and hidden states are read as they pass. The class token is one query for each of its keys; received attention
    compares all pairs. Queries and keys are the block's own.
    """
    signal, at = parse_tower_signal(name)
    if signal in ("keys", "hidden"):
        return 0
    if at is None:
        block = vision.layers - vision.unused - 1
    elif isinstance(at, Fraction):
        block = min(vision.layers - 1, int(at * vision.layers + Fraction(1, 2)))
    else:
        block = at % vision.layers
    if signal == "class_attention" and vision.class_keys(total, grids) is not None:
        pairs = vision.class_keys(total, grids)
    else:
        pairs = vision.pairs(total, grids, block)
    return None if pairs is None else pairs * vision.width
