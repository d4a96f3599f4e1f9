"""`agreement`: how often a condition gives the untouched model's answer, which asks for no labels."""

from __future__ import annotations

from dataclasses import replace

from tokenprune.study.cases import same_words
from tokenprune.study.evaluate.results import Evaluation


def agreement(result: Evaluation) -> Evaluation:
    """The same answers, each counted right where its words are those of the untouched model's answer.

    Intervals, differences and p-values are then of the share of equal answers. It says how much a recipe changes what
    the model says, not whether the change is for the worse.

    Args:
        result: from `evaluate`; the answers that its cases expect play no part.
    """
    wanted = result.outcomes[0].answers
    outcomes = [
        replace(each, right=[same_words(one, other) for one, other in zip(each.answers, wanted, strict=True)])
        for each in result.outcomes
    ]
    return Evaluation(result.cases, outcomes, measure="agreement")
