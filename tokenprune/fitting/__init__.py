"""Fitting learned parts to a frozen model, without labels: what the untouched model does is what they learn."""

from __future__ import annotations

from tokenprune.fitting.fit import Fitted, fit
from tokenprune.fitting.plan import Plan

__all__ = ["Fitted", "Plan", "fit"]
