"""Budgets: the only place where a `keep` becomes a count, and the solver that turns a budget into counts per stage.

All counts are vision tokens of one sample, merged ones included; layers are decoder layers. Everything here is host
arithmetic on plain numbers: no tensors, no data, so that a static schedule is known before the first layer runs.
"""

from __future__ import annotations

from tokenprune.budget.rule import Budget, BudgetKind, count_of
from tokenprune.budget.solver import Prices, check_share, plan
from tokenprune.budget.steps import (
    Recycle,
    Schedule,
    StaticSchedule,
    Step,
    Summary,
    nominal_counts,
    summary,
    survivors,
    together,
    tokens_per_layer,
)

__all__ = [
    "Budget",
    "BudgetKind",
    "Prices",
    "Recycle",
    "Schedule",
    "StaticSchedule",
    "Step",
    "Summary",
    "check_share",
    "count_of",
    "nominal_counts",
    "plan",
    "summary",
    "survivors",
    "together",
    "tokens_per_layer",
]
