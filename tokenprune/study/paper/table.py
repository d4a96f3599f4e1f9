"""`paper_table`: the runs of one model as rows of methods and columns of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import InputError, did_you_mean
from tokenprune.study.paper.runs import Run, TaskScore
from tokenprune.study.statistics import Estimate, bootstrap

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One method on one task."""

    metric: str
    score: float
    questions: int | None
    relative: Estimate | None
    """The score divided by the untouched model's. The interval is paired, and None where per-question scores are
    missing. None where there is nothing to divide by, or a lower score is the better one."""


@dataclass(frozen=True)
class PaperRow:
    """One method at one budget."""

    method: str
    budget: str
    untouched: bool
    tasks: dict[str, Cell]
    mean: Estimate | None
    """Mean of the relative scores over all tasks; None unless all of them are there."""
    average: float | None
    flops_share: float | None


@dataclass(frozen=True)
class PaperTable:
    """Methods by tasks. The untouched model comes first, then each budget in the order of the files."""

    model: str
    tasks: list[str]
    rows: list[PaperRow]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def paper_table(
    runs: Sequence[Run], *, metrics: Mapping[str, str] | None = None, untouched: str | None = None
) -> PaperTable:
    """The table of `runs`; of two runs of one method at one budget on a task, the later one counts.

    Args:
        runs: of one model.
        metrics: which metric of a task; without it the first of its file.
        untouched: method that the others are relative to, where no run is of the untouched model.

    Raises:
        InputError: runs of several models, none of the untouched one, a metric or method that is not there, or methods
            that were asked other questions.
    """
    models = sorted({run.model for run in runs})
    if len(models) > 1:
        raise InputError(f"results of {len(models)} models: {', '.join(models)}; make a table of each")
    if untouched is not None and untouched not in (known := {run.method for run in runs}):
        raise InputError(f"--untouched: no results of {untouched!r}{did_you_mean(untouched, known)}")
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if strayed := [task for task in metrics or {} if task not in tasks]:
        raise InputError(f"--metric: no results of task {strayed[0]!r}{did_you_mean(strayed[0], tasks)}")
    merged: dict[tuple[str, str], dict[str, TaskScore]] = {}
    told: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: run.when):
        scores = {task: _metric(run, task, (metrics or {}).get(task)) for task in run.tasks}
        merged.setdefault((run.method, run.budget), {}).update(scores)
        told[run.method, run.budget] = run
    bases = [key for key, run in told.items() if (run.method == untouched if untouched else run.untouched)]
    if len(bases) != 1:
        found = "several of" if bases else "no results of"
        raise InputError(f"{found} the untouched model: run with recipe=none, or name a method by --untouched")
    order = {run.budget: number for number, run in reversed(list(enumerate(runs)))}
    rows = [bases[0], *sorted((key for key in told if key != bases[0]), key=lambda key: order[key[1]])]
    made = [_row(told[key], merged[key], merged[bases[0]], tasks) for key in rows]
    return PaperTable(models[0], tasks, made)


def _metric(run: Run, task: str, wanted: str | None) -> TaskScore:
    scores = run.tasks[task]
    if wanted is None:
        return scores[0]
    known = [score.metric for score in scores]
    if wanted not in known:
        told = f"{run.source}: {task} has no metric {wanted!r}{did_you_mean(wanted, known)}"
        raise InputError(f"--metric: {told}; expected {', '.join(known)}")
    return scores[known.index(wanted)]


def _row(run: Run, own: Mapping[str, TaskScore], base: Mapping[str, TaskScore], tasks: Sequence[str]) -> PaperRow:
    """The row of a method; the untouched model is relative to nothing."""
    shared = _pictures(base)
    cells: dict[str, Cell] = {}
    draws: list[Array] = []
    for task in (task for task in tasks if task in own):
        score, relative = own[task], None
        if own is not base and task in base and base[task].value and base[task].higher_is_better:
            _check_alike(run, task, score, base[task])
            drawn = _draws(score, base[task], shared)
            relative = _estimate(score.value / base[task].value, drawn)
            draws += [] if drawn is None else [drawn]
        cells[task] = Cell(score.metric, score.value, score.questions, relative)
    found = [cell.relative.value for cell in cells.values() if cell.relative is not None]
    mean = None
    if len(found) == len(tasks):
        mean = _estimate(float(np.mean(found)), np.mean(draws, axis=0) if len(draws) == len(tasks) else None)
    return PaperRow(run.method, run.budget, own is base, cells, mean, run.average, run.flops_share)


def _pictures(base: Mapping[str, TaskScore]) -> dict[str, dict[str, int]]:
    """A number for each picture of the scores that are resampled together."""
    found: dict[str, dict[str, int]] = {}
    for score in base.values():
        numbers = found.setdefault(score.drawn_with, {})
        for key in score.each or ():
            numbers.setdefault(score.picture(key), len(numbers))
    return found


def _check_alike(run: Run, task: str, own: TaskScore, base: TaskScore) -> None:
    if own.metric != base.metric:
        raise InputError(
            f"{run.source}: {task} has the metric {own.metric}, the untouched model's {base.metric}; see --metric"
        )
    other = own.each is not None and base.each is not None and own.each.keys() != base.each.keys()
    if other or own.questions != base.questions:
        raise InputError(f"{run.source}: {task}: other questions than the untouched model was asked; run both alike")


def _draws(own: TaskScore, base: TaskScore, shared: Mapping[str, Mapping[str, int]]) -> Array | None:
    """Bootstrap draws of the relative score, by whole pictures, the same ones for all tasks that share them."""
    if own.each is None or base.each is None:
        return None
    numbers = shared[base.drawn_with]
    sums = np.zeros((len(numbers), 2))
    for key, score in base.each.items():
        sums[numbers[base.picture(key)]] += own.each[key], score
    return bootstrap(sums, lambda drawn: drawn[:, 0] / drawn[:, 1], seed=list(shared).index(base.drawn_with))


def _estimate(value: float, draws: Array | None) -> Estimate:
    """`value`, and 95 % of the draws that are numbers: one without any right answer of the untouched model is none."""
    finite = np.empty(0) if draws is None else draws[np.isfinite(draws)]
    if not len(finite):
        return Estimate(value, None, None)
    low, high = np.quantile(finite, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
