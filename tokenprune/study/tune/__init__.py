"""Search of a space of recipes for the best one for a model, its questions and a budget; reported on other pictures."""

from __future__ import annotations

from tokenprune.study.tune.result import Candidate, Skipped, Tuned
from tokenprune.study.tune.search import tune, tune_on
from tokenprune.study.tune.space import Choice, Space, default_space, make_space, read_choices, read_space

__all__ = [
    "Candidate",
    "Choice",
    "Skipped",
    "Space",
    "Tuned",
    "default_space",
    "make_space",
    "read_choices",
    "read_space",
    "tune",
    "tune_on",
]
