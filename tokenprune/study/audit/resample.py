"""Masks of pictures with different grids, resampled by area to one grid."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.study.statistics import Array


def total(masks: Iterable[NDArray[Any]], height: int, width: int) -> Array:
    """Sum of masks ``[h, w]``, each resampled by area to ``[height, width]``; what they add up to stays."""
    summed = np.zeros((height, width))
    for mask in masks:
        summed += overlap(height, mask.shape[0]) @ mask @ overlap(width, mask.shape[1]).T
    return summed


@lru_cache(maxsize=256)
def overlap(new: int, old: int) -> Array:
    """``[new, old]``: share of each of `old` equal intervals that lies in each of `new` ones; columns sum to 1."""
    i, j = np.arange(new)[:, None], np.arange(old)[None, :]
    inside = np.minimum((i + 1) * old, (j + 1) * new) - np.maximum(i * old, j * new)
    return np.clip(inside, 0, None) / new
