"""`Evaluation`: accuracy of each condition at each budget, with intervals and paired differences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.study.cases import Case
from tokenprune.study.evaluate.conditions import Condition
from tokenprune.study.statistics import Estimate, accuracy, difference, holm, sign_flip

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
    flops: list[int]
    """Multiply-adds of each prefill."""
    seconds: float
    """Time of the method in all batches together."""


@dataclass(frozen=True)
class ConditionRow:
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
    difficulties: dict[str, dict[str, Estimate]]
    """Accuracy by task and difficulty; tasks whose cases have no difficulty are left out."""
    total: float
    average: float
    """Vision tokens that entered a layer, mean over layers and questions."""
    final: float
    """Vision tokens in the last layer, mean over questions."""
    flops: float
    """Multiply-adds from pixels to the first token, the method's own among them, mean over questions."""
    flops_share: float
    """The same as a share of the untouched model's."""
    seconds: float
    """Seconds of the method per question: time of all batches divided by the number of questions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "condition": self.label,
            "budget": self.budget,
            "baseline": self.baseline,
            "draws": self.draws,
            "fingerprint": self.fingerprint,
            "accuracy": self.overall.to_dict(),
            "difference": self.change.to_dict(),
            "tasks": {
                task: {
                    "accuracy": self.tasks[task].to_dict(),
                    "difference": self.changes[task].to_dict(),
                    "difficulties": {name: each.to_dict() for name, each in self.difficulties.get(task, {}).items()},
                }
                for task in self.tasks
            },
            "total": self.total,
            "average": self.average,
            "final": self.final,
            "flops": self.flops,
            "flops_share": self.flops_share,
            "method_seconds": self.seconds,
        }


@dataclass(frozen=True)
class Pair:
    """Two conditions at one budget, on the tasks that count: accuracy of the first minus that of the second."""

    budget: str
    first: str
    second: str
    change: Estimate
    p: float
    """Two-sided, by flipping signs picture by picture: see `sign_flip`."""
    p_holm: float
    """The same, adjusted for all pairs of the evaluation: see `holm`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = {"budget": self.budget, "first": self.first, "second": self.second}
        return {**names, "difference": self.change.to_dict(), "p": self.p, "p_holm": self.p_holm}


@dataclass(frozen=True)
class Evaluation:
    """All outcomes of `evaluate`, the untouched model's first."""

    cases: list[Case]
    outcomes: list[Outcome]
    measure: Literal["accuracy", "agreement"] = "accuracy"
    """What counts as right: the answer that the case expects, or that of the untouched model (see `agreement`)."""

    @cached_property
    def tasks(self) -> dict[str, int]:
        """Questions of each task, in the order of tables."""
        ranks: dict[str, int] = {}
        for case in self.cases:
            ranks[case.task] = min(case.rank, ranks.get(case.task, case.rank))
        count = Counter(case.task for case in self.cases)
        return {task: count[task] for task in sorted(ranks, key=ranks.__getitem__)}

    @cached_property
    def ranked(self) -> tuple[str, ...]:
        """Tasks on which the untouched model reaches `GATE`."""
        right = self._scores([self.outcomes[0]])
        return tuple(task for task in self.tasks if right[self._of(task)].mean() >= GATE)

    @cached_property
    def rows(self) -> list[ConditionRow]:
        """The untouched model, then each budget: best first if there is a ranked task, else in the order given.

        Without a budget costs differ, so nothing is sorted.
        """
        made = [self._row(group) for group in self._groups.values()]
        if self.ranked and all(row.budget for row in made[1:]):
            places = {budget: place for place, budget in enumerate(dict.fromkeys(row.budget for row in made))}
            made[1:] = sorted(made[1:], key=lambda row: (places[row.budget], -row.overall.value))
        return made

    @cached_property
    def difficulties(self) -> dict[str, dict[str, int]]:
        """Questions of each difficulty, by task; cases without a difficulty are left out."""
        found: dict[str, dict[str, int]] = {}
        for task in self.tasks:
            names = sorted(case.difficulty for case in self.cases if case.task == task and case.difficulty)
            if names:
                found[task] = {name: names.count(name) for name in dict.fromkeys(names)}
        return found

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every two conditions at the same budget, compared on the same questions; the better one comes first.

        Two baselines are not compared with each other, unless there is nothing else.
        """
        only_baselines = all(row.baseline for row in self.rows[1:])
        compared = [
            (one, other)
            for budget in dict.fromkeys(row.budget for row in self.rows[1:])
            for one, other in combinations([row for row in self.rows[1:] if row.budget == budget], 2)
            if only_baselines or not (one.baseline and other.baseline)
        ]
        found = [self._compare(one, other) for one, other in compared]
        adjusted = holm([p for _, p in found])
        return [
            Pair(one.budget, one.label, other.label, change, p, p_holm)
            for (one, other), (change, p), p_holm in zip(compared, found, adjusted, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "measure": self.measure,
            "questions": len(self.cases),
            "pictures": len({case.picture_id for case in self.cases}),
            "tasks": {
                task: {"questions": n, "ranked": task in self.ranked, "difficulties": self.difficulties.get(task, {})}
                for task, n in self.tasks.items()
            },
            "gate": GATE,
            "rows": [row.to_dict() for row in self.rows],
            "pairs": [pair.to_dict() for pair in self.pairs],
        }

    def samples(self) -> dict[str, Any]:
        """Picture, question and task of each case, and its scores (mean over draws) in the order of `rows`: plain data.

        What others need to compare methods on the same questions. Names of pictures are shortened.
        """
        names = {name: str(number) for number, name in enumerate(dict.fromkeys(self._pictures.tolist()))}
        return {
            "picture": [names[case.picture_id] for case in self.cases],
            "question": [case.key for case in self.cases],
            "task": [case.task for case in self.cases],
            "scores": [self._scores(self._groups[row.label, row.budget]).tolist() for row in self.rows],
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

    def _compare(self, one: ConditionRow, other: ConditionRow) -> tuple[Estimate, float]:
        """Accuracy of the first minus that of the second on what counts, and the p-value of their being alike."""
        first, second = (self._scores(self._groups[row.label, row.budget])[self._counted] for row in (one, other))
        pictures = self._pictures[self._counted].tolist()
        return difference(first, second, pictures), sign_flip(first, second, pictures)

    def _by_difficulty(self, scores: NDArray[np.float64], task: str) -> dict[str, Estimate]:
        made = {}
        for name in self.difficulties[task]:
            of = np.array([(case.task, case.difficulty) == (task, name) for case in self.cases])
            made[name] = accuracy(scores[of], self._pictures[of].tolist())
        return made

    def _row(self, outcomes: list[Outcome]) -> ConditionRow:
        condition = outcomes[0].condition
        scores, reference = self._scores(outcomes), self._scores(self.outcomes[:1])
        pictures, counted = self._pictures, self._counted
        tasks, changes = {}, {}
        for task in self.tasks:
            of = self._of(task)
            tasks[task] = accuracy(scores[of], pictures[of].tolist())
            changes[task] = difference(scores[of], reference[of], pictures[of].tolist())
        flops = float(np.mean([outcome.flops for outcome in outcomes]))
        return ConditionRow(
            condition.label,
            condition.group[1],
            condition.baseline,
            len(outcomes),
            condition.fingerprint,
            overall=accuracy(scores[counted], pictures[counted].tolist()),
            change=difference(scores[counted], reference[counted], pictures[counted].tolist()),
            tasks=tasks,
            changes=changes,
            difficulties={task: self._by_difficulty(scores, task) for task in self.difficulties},
            total=float(np.mean(outcomes[0].total)),
            average=float(np.mean([outcome.average for outcome in outcomes])),
            final=float(np.mean([outcome.final for outcome in outcomes])),
            flops=flops,
            flops_share=flops / float(np.mean(self.outcomes[0].flops)),
            seconds=sum(outcome.seconds for outcome in outcomes) / len(outcomes) / len(self.cases),
        )
