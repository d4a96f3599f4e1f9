"""How much time a recipe saves on this machine, beside what its multiply-adds promise."""

from __future__ import annotations

from tokenprune.study.bench.result import Bench, Row
from tokenprune.study.bench.run import bench
from tokenprune.study.bench.statistics import Ratio, ratio

__all__ = ["Bench", "Ratio", "Row", "bench", "ratio"]
