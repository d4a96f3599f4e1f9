"""What `tokenprune eval` tells: tables for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from tokenprune.cli.terminal import console, table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from tokenprune.study.evaluate import ConditionRow, Estimate, Evaluation

COLUMNS = (
    "condition",
    "budget",
    "baseline",
    "draws",
    "fingerprint",
    "task",
    "ranked",
    "questions",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "difference",
    "difference_low",
    "difference_high",
    "total",
    "average",
    "final",
    "flops",
    "flops_share",
    "method_seconds",
)
OVERALL = "overall"
FEW = 30
"""Pictures below which resampling them says too little."""


def as_csv(result: Evaluation) -> str:
    """A line for each condition, budget and task; task `overall` is what conditions are ranked by."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(name.replace("accuracy", result.measure) for name in COLUMNS)
    counted = sum(result.tasks[task] for task in result.ranked or result.tasks)
    for row in result.rows:
        head = (row.label, row.budget, _yes(row.baseline), row.draws, row.fingerprint)
        cost = (row.total, row.average, row.final, row.flops, row.flops_share, row.seconds)
        overall = (OVERALL, _yes(bool(result.ranked)), counted, *astuple(row.overall), *astuple(row.change))
        writer.writerow((*head, *overall, *cost))
        for task, questions in result.tasks.items():
            told = (task, _yes(task in result.ranked), questions)
            writer.writerow((*head, *told, *astuple(row.tasks[task]), *astuple(row.changes[task]), *cost))
    return made.getvalue()


def show(result: Evaluation, *, model: str, pairs: bool = True, difficulty: bool = False) -> None:
    """Print the evaluation for people; `pairs` adds the differences, `difficulty` accuracy by difficulty."""
    screen = console()
    pictures = len({case.picture_id for case in result.cases})
    screen.print(
        f"{model}: {len(result.cases)} questions about {pictures} {_pictures(pictures)}", highlight=False, markup=False
    )
    screen.print()
    screen.print(_overall(result, screen))
    if len(result.tasks) > 1:
        for tasks in _side_by_side(result, screen.width):
            screen.print()
            screen.print(_tasks(result, tasks))
    if difficulty:
        for task in result.difficulties:
            screen.print()
            screen.print(_difficulties(result, task))
    if pairs and result.pairs:
        screen.print()
        screen.print(_pairs(result))
    screen.print()
    for line in _notes(result, pairs=pairs and bool(result.pairs)):
        screen.print(f"[dim]{line}")


def _overall(result: Evaluation, screen: Console) -> RenderableType:
    """Right answers and cost; where it is narrow, intervals of differences stand below them, in every row."""
    beside = _overall_with(result, "  ")
    unbound = screen.options.update(max_width=10 * screen.width)  # else a measure is never above the screen's
    fits = screen.measure(beside, options=unbound).maximum <= screen.width
    return beside if fits else _overall_with(result, "\n")


def _overall_with(result: Evaluation, between: str) -> RenderableType:
    against = [] if result.measure == "agreement" else [">vs untouched"]  # the untouched model always agrees
    made = table("", ">tokens", ">final", ">FLOPs", f">{_right(result)}", ">95 %", *against, ">method")
    made.columns[0].no_wrap = True
    budget = ""
    for row in result.rows:
        if row.budget != budget:
            budget = row.budget
            made.add_row(f"[dim]{budget}")
        change = (
            "" if row.label == "untouched" else f"{100 * row.change.value:+.1f}{between}{_range(row.change, '+.1f')}"
        )
        method = f"{1000 * row.seconds:.1f} ms" if row.seconds else ""
        right = f"{100 * row.overall.value:.1f}"
        cells = (f"{row.average:.1f}", f"{row.final:.1f}", f"{row.flops_share:.0%}", right)
        made.add_row(_name(row), *cells, _range(row.overall, ".1f"), *([change] if against else []), method)
    return made


def _side_by_side(result: Evaluation, width: int) -> list[list[str]]:
    """Tasks that fit beside each other into a table of `width`, so that no name and no interval is broken."""
    left = max(len(row.label) for row in result.rows) + 1
    groups: list[list[str]] = [[]]
    used = left
    for task in result.tasks:
        needed = max(len(task) + 1, len("34–100")) + 1  # a star, or the widest interval; and the space behind it
        if groups[-1] and used + needed > width:
            groups, used = [*groups, []], left
        groups[-1].append(task)
        used += needed
    return groups


def _tasks(result: Evaluation, tasks: Sequence[str]) -> RenderableType:
    """Accuracy of each task, and below it the interval."""
    made = table(_right(result), *(f">{task}{'' if task in result.ranked else '*'}" for task in tasks))
    made.padding = (0, 1, 0, 0)
    budget = ""
    for row in result.rows:
        if row.budget != budget:
            budget = row.budget
            made.add_row(f"[dim]{budget}")
        cells = [f"{100 * row.tasks[task].value:.0f}\n[dim]{_range(row.tasks[task], '.0f')}" for task in tasks]
        made.add_row(_name(row), *cells)
    return made


def _difficulties(result: Evaluation, task: str) -> RenderableType:
    """Accuracy of each difficulty of a task, and above it how many questions are so difficult."""
    known = result.difficulties[task]
    made = table(f"{task}, {_right(result)}", *(f">{name}\n{questions}" for name, questions in known.items()))
    budget = ""
    for row in result.rows:
        if row.budget != budget:
            budget = row.budget
            made.add_row(f"[dim]{budget}")
        made.add_row(_name(row), *(f"{100 * row.difficulties[task][name].value:.0f}" for name in known))
    return made


def _pairs(result: Evaluation) -> RenderableType:
    """Every two conditions of a budget, the better one first."""
    made = table("better by", "", ">points", ">95 %", ">p", ">p, Holm")
    budget = ""
    for pair in result.pairs:
        if pair.budget != budget:
            budget = pair.budget
            made.add_row(f"[dim]{budget}")
        value = f"{100 * pair.change.value:+.1f}"
        numbers = (value, _range(pair.change, "+.1f"), f"{pair.p:.4f}", f"{pair.p_holm:.4f}")
        made.add_row(_plain(pair.first), _plain(pair.second), *numbers)
    return made


def _notes(result: Evaluation, *, pairs: bool) -> list[str]:
    from tokenprune.study.evaluate import GATE, SMALLER

    labels = {row.label: row for row in result.rows}
    lines = ["tokens: vision tokens in a layer, mean over layers; final: in the last one; method: time a question"]
    lines.append("FLOPs: from pixels to the first token, the method's own among them, of the untouched model's")
    lines.append("95 %: intervals by resampling pictures; differences are paired and in points")
    if result.measure == "agreement":
        lines.append("same: answers whose words are those of the untouched model's, right or wrong")
    if pairs:
        many = len(result.pairs)
        lines.append(f"p: two-sided, by flipping signs picture by picture; Holm: adjusted for the {many} pairs")
    weak = [task for task in result.tasks if task not in result.ranked]
    if weak and result.ranked:
        count = ", ".join(weak)
        lines.append(f"* not ranked, the untouched model is right in less than {100 * GATE:.0f} %: {count}")
    elif weak:
        lines.append(f"* nothing is ranked: the untouched model is right in less than {100 * GATE:.0f} % of every task")
    if (pictures := len({case.picture_id for case in result.cases})) < FEW:
        lines.append(
            f"only {pictures} {_pictures(pictures)}: with fewer than {FEW} the intervals are too narrow; take more"
        )
    if SMALLER in labels:
        lines.append(f"{SMALLER}: scaled down to as many tokens' worth of pixels before the model sees it")
        if any(row.label == SMALLER and row.flops_share > 0.999 for row in result.rows):
            lines.append(f"{SMALLER}: this model scales it up again and computes all tokens, so it saves no FLOPs")
    if any(row.draws > 1 for row in result.rows):
        drawn = ", ".join(f"{label} of {row.draws}" for label, row in labels.items() if row.draws > 1)
        lines.append(f"mean over draws (of uniform: phases): {drawn}")
    return lines


def _right(result: Evaluation) -> str:
    """What the columns of shares are headed."""
    return "right %" if result.measure == "accuracy" else "same %"


def _plain(label: str) -> Text:
    from rich.text import Text

    return Text(label)


def _name(row: ConditionRow) -> Text:
    from rich.text import Text

    return Text(row.label, style="" if not row.baseline else "dim")


def _range(estimate: Estimate, form: str) -> str:
    low, high = (f"{100 * end:{form}}" for end in estimate.ends)
    return f"{low}…{high}" if "+" in form else f"{low}–{high}"  # beside a minus, a dash confuses


def _pictures(count: int) -> str:
    return "picture" if count == 1 else "pictures"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
