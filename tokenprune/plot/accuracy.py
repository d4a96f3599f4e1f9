"""Accuracy against cost, as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.plot.style import INK, SOFT_INK
from tokenprune.study.evaluate.conditions import SMALLER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.study.evaluate.results import ConditionRow, Evaluation

COLOURS = ("#0b7285", "#c2410c", "#6741d9", "#2b8a3e", "#b5179e", "#1c4fd8", "#7c5a00", "#a61e1e")
GREYS = ("#5c6670", "#7d8790", "#9aa3ab", "#b3bac1")
MARKS = "osD^vPX*"


def plot_accuracy(result: Evaluation, *, flops: bool = False, title: str | None = None) -> Figure:
    """Draw accuracy over cost: a line for each recipe, grey dashed lines for the baselines.

    Bars are 95 % intervals of the accuracy. Differences between recipes are more certain than the bars suggest,
    because all answer the same questions: see the paired differences of the table.

    Args:
        result: from `evaluate`.
        flops: cost is not the average vision tokens in a layer, but the multiply-adds of a prefill, from pixels to the
            first token, in per cent of the untouched model's.
        title: text above the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.2), dpi=150, layout="constrained", facecolor="white")
    axes: Axes = figure.add_subplot()
    untouched, *rest = result.rows
    axes.axhline(100 * untouched.overall.value, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    widest = _cost(untouched, flops)
    axes.plot([widest], [100 * untouched.overall.value], "o", color=INK, label="untouched", markersize=5)
    # Lines that share their tokens would hide each other's bars: set each a little aside.
    labels = list(dict.fromkeys(row.label for row in rest))
    colours, greys = iter(COLOURS * (1 + len(labels) // len(COLOURS))), iter(GREYS * (1 + len(labels) // len(GREYS)))
    for number, label in enumerate(labels):
        rows = sorted((row for row in rest if row.label == label), key=lambda row: _cost(row, flops))
        aside = (number - (len(labels) - 1) / 2) * 0.004 * widest
        colour = next(greys) if rows[0].baseline else next(colours)
        _line(axes, rows, [_cost(row, flops) + aside for row in rows], colour, MARKS[number % len(MARKS)])
    what = "ranked tasks" if result.ranked else "all tasks, none of them ranked"
    axes.set_ylabel(f"{result.measure} in %, {what}", color=SOFT_INK, fontsize=8.5)
    words = f"vision tokens in a layer, mean over layers (of {untouched.total:.0f})"
    if flops:
        words = "multiply-adds of a prefill, % of the untouched model's"
    elif SMALLER in labels:
        words += f"; {SMALLER}: tokens' worth of pixels"
    axes.set_xlabel(words, color=SOFT_INK, fontsize=8.5)
    axes.set_xlim(0, max(_cost(row, flops) for row in result.rows) * 1.04)
    axes.tick_params(colors=SOFT_INK, labelsize=8)
    axes.grid(axis="y", color="#e4e7ea", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title is not None:
        axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _cost(row: ConditionRow, flops: bool) -> float:
    return 100 * row.flops_share if flops else row.average


def _line(axes: Axes, rows: list[ConditionRow], places: list[float], colour: str, mark: str) -> None:
    values = [100 * row.overall.value for row in rows]
    bars = [
        [100 * max(0.0, row.overall.value - row.overall.ends[0]) for row in rows],
        [100 * max(0.0, row.overall.ends[1] - row.overall.value) for row in rows],
    ]
    axes.errorbar(
        places,
        values,
        yerr=bars,
        label=rows[0].label,
        color=colour,
        marker=mark,
        markersize=4.5,
        linewidth=1.3,
        elinewidth=0.8,
        linestyle="--" if rows[0].baseline else "-",
        zorder=2 if rows[0].baseline else 3,
    )
