"""How `tokenprune table` is laid out: text for a terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.cli.terminal import console, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tokenprune.study.paper import Cell, PaperRow, PaperTable
    from tokenprune.study.statistics import Estimate

NONE = "–"
MEAN = "mean"
COLUMNS = (
    *("method", "budget", "task", "metric", "questions", "score"),
    *("relative", "relative_low", "relative_high", "average_share", "flops_share"),
)


def show(made: PaperTable) -> None:
    """Print the table, as many tasks side by side as the terminal takes."""
    screen = console()
    screen.print(f"{made.model}: {_counted(made)}", highlight=False, markup=False)
    for number, tasks in enumerate(_side_by_side(made, screen.width)):
        screen.print()
        screen.print(_part(made, tasks, first=number == 0))
    screen.print()
    for line in notes(made):
        screen.print(f"[dim]{line}")


def _counted(made: PaperTable) -> str:
    questions = [cell.questions for cell in made.rows[0].tasks.values() if cell.questions is not None]
    methods = len({row.method for row in made.rows})
    return f"{methods} methods, {len(made.tasks)} tasks, {sum(questions)} questions"


def _part(made: PaperTable, tasks: Sequence[str], *, first: bool) -> RenderableType:
    """Some columns of the table; the first ones with the mean before them."""
    from rich.text import Text

    found = table("score, relative %", *([f">{MEAN}"] if first else []), *(f">{task}" for task in tasks))
    found.padding = (0, 1, 0, 0)
    budget = ""
    for row in made.rows:
        if row.budget != budget:
            budget = row.budget
            found.add_row(f"[dim]{budget or 'own counts'}")
        mean = [f"\n[dim]{relative(row.mean)}"] if first else []
        cells = [_cell(made, row, task, "\n[dim]") for task in tasks]
        found.add_row(Text(row.method), *mean, *cells)
    return found


def _side_by_side(made: PaperTable, width: int) -> list[list[str]]:
    """Tasks that fit beside each other into a table of `width`."""
    left = max(len("score, relative %"), *(len(row.method) for row in made.rows)) + 1
    groups: list[list[str]] = [[]]
    used = left + len("100.0 99–100") + 1
    for task in made.tasks:
        cells = [_cell(made, row, task, "\n") for row in made.rows]
        needed = max(len(task), *(len(line) for cell in cells for line in cell.splitlines())) + 1
        if groups[-1] and used + needed > width:
            groups, used = [*groups, []], left
        groups[-1].append(task)
        used += needed
    return groups


def as_markdown(made: PaperTable) -> str:
    """A table of Markdown, and its notes."""
    names = [name.replace("|", "\\|") for name in made.tasks]
    lines = ["| method | budget | " + " | ".join(names) + f" | {MEAN} |", "|---|---|" + "---:|" * (len(names) + 1)]
    for row in made.rows:
        cells = [_cell(made, row, task, "<br>") for task in made.tasks]
        budget = "" if row.untouched else row.budget or "own counts"
        lines.append(f"| {row.method} | {budget} | " + " | ".join(cells) + f" | {relative(row.mean)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(made)), ""])


def as_csv(made: PaperTable) -> str:
    """A line for each method, budget and task; task `mean` is the mean of the relative scores."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in made.rows:
        cost = (row.average, row.flops_share)
        for task, cell in row.tasks.items():
            told = (task, cell.metric, cell.questions, cell.score)
            writer.writerow((row.method, row.budget, *told, *_ends(cell.relative), *cost))
        if row.mean is not None:
            writer.writerow((row.method, row.budget, MEAN, "", "", "", *_ends(row.mean), *cost))
    return text.getvalue()


def notes(made: PaperTable) -> list[str]:
    """What a reader has to know of the numbers."""
    metrics = {task: cell.metric for row in made.rows for task, cell in row.tasks.items()}
    names = dict.fromkeys(metrics.values())
    told = next(iter(names)) if len(names) == 1 else ", ".join(f"{task}: {name}" for task, name in metrics.items())
    lines = [f"score: {told}", "relative: per cent of the untouched model's score; mean: over all tasks"]
    cells = [cell for row in made.rows if not row.untouched for cell in row.tasks.values()]
    if any(cell.relative is not None and cell.relative.low is not None for cell in cells):
        lines.append("intervals: 95 %, paired, questions drawn anew (by picture where the file tells pictures)")
    if any(cell.relative is None or cell.relative.low is None for cell in cells):
        lines.append("no interval: the file has no score of each question, or the task's score is not their mean")
    kinds = {row.budget.partition(":")[0] for row in made.rows if not row.untouched}
    if kinds - {"average", "flops"}:
        lines.append("not of equal cost: only budgets average and flops count all layers")
    return lines


def _cell(made: PaperTable, row: PaperRow, task: str, between: str) -> str:
    cell = row.tasks.get(task)
    if cell is None:
        return NONE
    score = f"{_scale(made, task) * cell.score:.1f}"
    return score if row.untouched else f"{score}{between}{relative(cell.relative)}"


def _scale(made: PaperTable, task: str) -> float:
    """100 where all scores of the task are shares."""
    cells: list[Cell] = [row.tasks[task] for row in made.rows if task in row.tasks]
    return 100.0 if all(0 <= cell.score <= 1 for cell in cells) else 1.0


def relative(estimate: Estimate | None) -> str:
    """Per cent, and its interval where there is one."""
    if estimate is None:
        return NONE
    value = f"{100 * estimate.value:.1f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} {100 * estimate.low:.0f}–{100 * estimate.high:.0f}"


def _ends(estimate: Estimate | None) -> tuple[float | str, float | str, float | str]:
    if estimate is None:
        return "", "", ""
    low, high = estimate.low, estimate.high
    return estimate.value, "" if low is None else low, "" if high is None else high
