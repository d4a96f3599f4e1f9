"""A paper's table from result files: methods by tasks, at equal budgets, relative to the untouched model."""

from __future__ import annotations

from tokenprune.study.paper.files import read_runs
from tokenprune.study.paper.runs import Run, TaskScore
from tokenprune.study.paper.table import Cell, PaperRow, PaperTable, paper_table

__all__ = ["Cell", "PaperRow", "PaperTable", "Run", "TaskScore", "paper_table", "read_runs"]
