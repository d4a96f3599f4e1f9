"""Pairings of two lists of cases, some of which wait for ``-m slow``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def half(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """All pairs, as parameters of a test: every second one is slow, so that each value meets half of the others."""
    pairs = product(enumerate(first), enumerate(second))
    return [
        pytest.param(a, b, marks=pytest.mark.slow if (row + column) % 2 else (), id=f"{a}-{b}")
        for (row, a), (column, b) in pairs
    ]
