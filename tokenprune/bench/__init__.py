"""How much time a recipe saves on this machine, beside what its multiply-adds promise."""

from __future__ import annotations

from tokenprune.bench.result import Bench, Row
from tokenprune.bench.run import bench
from tokenprune.bench.statistics import Ratio, ratio

__all__ = ["Bench", "Ratio", "Row", "bench", "ratio"]
