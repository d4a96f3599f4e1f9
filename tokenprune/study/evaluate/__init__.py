"""Accuracy of recipes at equal cost, with intervals: on generated scenes, or on pictures and questions of your own."""

from __future__ import annotations

from tokenprune.study.cases import Case, normal, same_words
from tokenprune.study.evaluate.agree import agreement
from tokenprune.study.evaluate.conditions import BASELINES, SMALLER, UNTOUCHED, Condition, make_conditions
from tokenprune.study.evaluate.respondent import Ask, Check, Request, Respondent, Response, UnknownWords
from tokenprune.study.evaluate.results import GATE, ConditionRow, Evaluation, Outcome, Pair
from tokenprune.study.evaluate.sweep import evaluate, evaluate_on
from tokenprune.study.statistics import Estimate, accuracy, difference, holm, sign_flip, wilson

__all__ = [
    "BASELINES",
    "GATE",
    "SMALLER",
    "UNTOUCHED",
    "Ask",
    "Case",
    "Check",
    "Condition",
    "ConditionRow",
    "Estimate",
    "Evaluation",
    "Outcome",
    "Pair",
    "Request",
    "Respondent",
    "Response",
    "UnknownWords",
    "accuracy",
    "agreement",
    "difference",
    "evaluate",
    "evaluate_on",
    "holm",
    "make_conditions",
    "normal",
    "same_words",
    "sign_flip",
    "wilson",
]
