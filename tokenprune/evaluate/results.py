"""What came out: one row for each condition at each budget, with intervals and paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.evaluate.cases import Case
from tokenprune.evaluate.conditions import Condition
from tokenprune.evaluate.statistics import Estimate, accuracy, difference
from tokenprune.scenes import TASKS

GATE = 0.85
"""A task that the untouched model answers worse than this says little about a method: it is shown, but not ranked."""


@dataclass(frozen=True)
class Outcome:
    """One condition over all cases; every list has an entry for each case."""

    condition: Condition
    answers: list[str]
    right: list[bool]
    total: list[int]
    average: list[float]
    final: list[float]
    seconds: float
    """Time of the method in all batches together."""


@dataclass(frozen=True)
class Row:
    """A condition at a budget, all its draws together."""

    label: str
    budget: str
    baseline: bool
    draws: int
    fingerprint: str
    """Of the first draw."""
    overall: Estimate
    """Accuracy on the ranked tasks; on all of them where none is ranked."""
    change: Estimate
    """The same minus the untouched model's, on the same questions."""
    tasks: dict[str, Estimate]
    changes: dict[str, Estimate]
    total: float
    average: float
    """Vision tokens that entered a layer, mean over layers and questions."""
    final: float
    """Vision tokens in the last layer, mean over questions."""
    seconds: float
    """Time of the method for one question, of a batch's time its share."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "condition": self.label,
            "budget": self.budget,
            "baseline": self.baseline,
            "draws": self.draws,
            "fingerprint": self.fingerprint,
            "accuracy": _plain(self.overall),
            "difference": _plain(self.change),
            "tasks": {
                task: {"accuracy": _plain(self.tasks[task]), "difference": _plain(self.changes[task])}
                for task in self.tasks
            },
            "total": self.total,
            "average": self.average,
            "final": self.final,
            "method_seconds": self.seconds,
        }


@dataclass(frozen=True)
class Pair:
    """Two conditions at one budget, on the tasks that count: accuracy of the first minus that of the second."""

    budget: str
    first: str
    second: str
    change: Estimate


@dataclass(frozen=True)
class Evaluation:
    """All outcomes of `evaluate`, the untouched model's first."""

    cases: list[Case]
    outcomes: list[Outcome]

    @cached_property
    def tasks(self) -> dict[str, int]:
        """Questions of each task."""
        found: dict[str, int] = {}
        for case in self.cases:
            found[case.task] = found.get(case.task, 0) + 1
        usual = {task: place for place, task in enumerate(TASKS)}
        return dict(sorted(found.items(), key=lambda item: usual.get(item[0], len(usual))))

    @cached_property
    def ranked(self) -> tuple[str, ...]:
        """Tasks on which the untouched model reaches `GATE`."""
        right = self._scores([self.outcomes[0]])
        return tuple(task for task in self.tasks if right[self._of(task)].mean() >= GATE)

    @cached_property
    def rows(self) -> list[Row]:
        """The untouched model, then each budget: best first if there is a ranked task, else in the order given.

        Without a budget costs differ, so nothing is sorted.
        """
        made = [self._row(group) for group in self._groups.values()]
        if self.ranked and all(row.budget for row in made[1:]):
            places = {budget: place for place, budget in enumerate(dict.fromkeys(row.budget for row in made))}
            made[1:] = sorted(made[1:], key=lambda row: (places[row.budget], -row.overall.value))
        return made

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every two conditions at the same budget, compared on the same questions; the better one comes first.

        Many comparisons find differences by chance alone: one in twenty intervals misses the truth.
        """
        made = []
        for budget in dict.fromkeys(row.budget for row in self.rows[1:]):
            labels = [row.label for row in self.rows[1:] if row.budget == budget]
            for one, other in combinations(labels, 2):
                better, worse = (self._scores(self._groups[label, budget])[self._counted] for label in (one, other))
                change = difference(better, worse, self._pictures[self._counted].tolist())
                made.append(Pair(budget, one, other, change))
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "questions": len(self.cases),
            "pictures": len({case.picture_id for case in self.cases}),
            "tasks": {task: {"questions": n, "ranked": task in self.ranked} for task, n in self.tasks.items()},
            "gate": GATE,
            "rows": [row.to_dict() for row in self.rows],
            "pairs": [
                {"budget": pair.budget, "first": pair.first, "second": pair.second, "difference": _plain(pair.change)}
                for pair in self.pairs
            ],
        }

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[Outcome]]:
        """The draws of each condition at each budget."""
        groups: dict[tuple[str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault(outcome.condition.group, []).append(outcome)
        return groups

    @cached_property
    def _pictures(self) -> NDArray[Any]:
        return np.array([case.picture_id for case in self.cases])

    @cached_property
    def _counted(self) -> NDArray[np.bool_]:
        """Which cases count in the ranking."""
        return np.array([not self.ranked or case.task in self.ranked for case in self.cases])

    def _of(self, task: str) -> NDArray[np.bool_]:
        return np.array([case.task == task for case in self.cases])

    def _scores(self, outcomes: list[Outcome]) -> NDArray[np.float64]:
        """Right answers of each case, mean over the draws."""
        return np.array([outcome.right for outcome in outcomes], np.float64).mean(0)

    def _row(self, outcomes: list[Outcome]) -> Row:
        condition = outcomes[0].condition
        scores, reference = self._scores(outcomes), self._scores(self.outcomes[:1])
        pictures, counted = self._pictures, self._counted
        tasks, changes = {}, {}
        for task in self.tasks:
            of = self._of(task)
            tasks[task] = accuracy(scores[of], pictures[of].tolist())
            changes[task] = difference(scores[of], reference[of], pictures[of].tolist())
        return Row(
            condition.label,
            condition.group[1],
            condition.baseline,
            len(outcomes),
            condition.fingerprint,
            overall=accuracy(scores[counted], pictures[counted].tolist()),
            change=difference(scores[counted], reference[counted], pictures[counted].tolist()),
            tasks=tasks,
            changes=changes,
            total=float(np.mean(outcomes[0].total)),
            average=float(np.mean([outcome.average for outcome in outcomes])),
            final=float(np.mean([outcome.final for outcome in outcomes])),
            seconds=sum(outcome.seconds for outcome in outcomes) / len(outcomes) / len(self.cases),
        )


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
