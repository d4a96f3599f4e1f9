"""How much time a recipe saves on this machine, beside what its multiply-adds promise."""

from __future__ import annotations

from tokenprune.study.bench.result import Bench, SideRow
from tokenprune.study.bench.rounds import bench
from tokenprune.study.statistics import Estimate, median_ratio

__all__ = ["Bench", "Estimate", "SideRow", "bench", "median_ratio"]
