"""Pictures of docs/evidence.md, drawn from the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grid
import verdict
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.plot.style import COLOURS, INK, SOFT_INK

CRITERIA = ("attention", "attention-vision", "no-rope")
LINES = ("attention", "no-rope", "no-rope+grid", "uniform", "random", "last")


def _panel(figure: Figure, rows: int, columns: int, number: int) -> Axes:
    axes: Axes = figure.add_subplot(rows, columns, number)
    axes.tick_params(colors=SOFT_INK, labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def rows_kept(found: list[dict[str, Any]], criteria: Sequence[str] = CRITERIA) -> Figure:
    """Share of each row's tokens that is kept, top row first: a line per model, a panel per criterion and layer."""
    height = 0.6 + 1.6 * len(criteria)
    figure = Figure(figsize=(8.4, height), dpi=150, layout="constrained", facecolor="white")
    for row, criterion in enumerate(criteria):
        for column, layer in enumerate(grid.LAYERS):
            axes = _panel(figure, len(criteria), len(grid.LAYERS), row * len(grid.LAYERS) + column + 1)
            axes.axhline(0.25, color=INK, linewidth=0.7, linestyle=":")
            for each, colour in zip(found, COLOURS, strict=False):
                for audit in each["audits"]:
                    if (audit["criterion"], audit["layer"], audit["task"]) == (criterion, layer, "localisation"):
                        profile = audit["rows"]["profile"]
                        axes.plot(range(1, len(profile) + 1), profile, color=colour, linewidth=1.2, label=each["name"])
            axes.set_ylim(0, 1)
            axes.set_xticks([1, 4, 8, 12])
            axes.set_title(f"{criterion}, K = {layer}", loc="left", fontsize=8, color=INK)
            if row == len(criteria) - 1:
                axes.set_xlabel("row of vision tokens, top first", fontsize=7, color=SOFT_INK)
            if column == 0:
                axes.set_ylabel("share kept", fontsize=7, color=SOFT_INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(found), frameon=False, fontsize=8)
    return figure


def accuracy_by_count(found: list[dict[str, Any]]) -> Figure:
    """Localisation over tokens kept: a line per criterion, a panel per model and layer; models with the whole grid."""
    found = [each for each in found if len(each["counts"]) > 1]
    figure = Figure(figsize=(8.4, 1.0 + 1.9 * len(found)), dpi=150, layout="constrained", facecolor="white")
    for row, each in enumerate(found):
        untouched = verdict.task_accuracy(each, "untouched", "localisation")
        for column, layer in enumerate(grid.LAYERS):
            axes = _panel(figure, len(found), len(grid.LAYERS), row * len(grid.LAYERS) + column + 1)
            axes.axhline(100 * untouched, color=INK, linewidth=0.7, linestyle=":")
            for name, colour in zip(LINES, COLOURS, strict=False):
                budgets = [str(grid.Budget("keep", count)) for count in grid.COUNTS]
                values = [verdict.task_accuracy(each, f"{name}.{layer}", "localisation", b) for b in budgets]
                line = [100 * value for value in values]
                axes.plot(grid.COUNTS, line, "o-", color=colour, linewidth=1.2, markersize=2.5, label=name)
            axes.set_ylim(0, 103)
            axes.set_title(f"{each['name']}, K = {layer}", loc="left", fontsize=8, color=INK)
            if row == len(found) - 1:
                axes.set_xlabel("vision tokens kept, of 144", fontsize=7, color=SOFT_INK)
            if column == 0:
                axes.set_ylabel("localised, %", fontsize=7, color=SOFT_INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES), frameon=False, fontsize=8)
    return figure
