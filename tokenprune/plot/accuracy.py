"""Accuracy against cost, as a matplotlib figure: lines where there are several budgets, sorted dots where there is one.

Bars are 95 % intervals of the accuracy. Differences between recipes are more certain than the bars suggest, because all
answer the same questions: see the paired differences of the table.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tokenprune.plot.style import COLOURS, GREYS, INK, MARKS, heading, heading_height, label, look, titled
from tokenprune.study.evaluate.conditions import SMALLER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.study.evaluate.results import ConditionRow, Evaluation


def plot_accuracy(result: Evaluation, *, flops: bool = False, title: str | None = None) -> Figure:
    """Draw accuracy over cost, baselines in grey.

    Several budgets: a line for each recipe, dashed for baselines. One budget: a dot for each, the best on top, with its
    cost beside its name.

    Args:
        result: from `evaluate`.
        flops: cost is not the average vision tokens in a layer, but the multiply-adds of a prefill, from pixels to the
            first token, in per cent of the untouched model's.
        title: text above the axes.
    """
    rows = result.rows[1:]
    if rows and max(Counter(row.label for row in rows).values()) == 1:
        return _dots(result, flops, title)
    return _lines(result, flops, title)


def _dots(result: Evaluation, flops: bool, title: str | None) -> Figure:
    from matplotlib.figure import Figure

    untouched, *rest = result.rows
    rows = [untouched, *sorted(rest, key=lambda row: -row.overall.value)]
    names = [f"{row.label}  ·  {_told(row, flops)}" for row in rows]
    width, above, below = 7.2, heading_height(title, 7.2), 0.55
    size = (width, 0.2 + 0.3 * len(rows) + above + below)
    figure = Figure(figsize=size, dpi=150, facecolor="white")
    heading(figure, title)
    axes: Axes = figure.add_subplot()
    left = (0.25 + 0.072 * max(map(len, names))) / width
    figure.subplots_adjust(left=left, right=0.97, bottom=below / size[1], top=1 - (above + 0.05) / size[1])
    axes.axvline(100 * untouched.overall.value, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    for place, row in enumerate(rows):
        value, (low, high) = row.overall.value, row.overall.ends
        colour = INK if row is untouched else GREYS[1] if row.baseline else COLOURS[0]
        mark = "s" if row.baseline and row is not untouched else "o"
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=1.6, zorder=2)
        axes.plot([100 * value], [place], mark, color=colour, markersize=6, zorder=3)
        axes.text(100 * value, place - 0.22, f"{100 * value:.1f}", color=colour, bbox=_BEHIND, **_ABOVE)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    label(axes, f"{_measured(result)}, with 95 % interval; squares: baselines")
    look(axes, grid="x")
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    return figure


_ABOVE: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7.5}
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def _lines(result: Evaluation, flops: bool, title: str | None) -> Figure:
    figure = titled(title, 6.8, 4.2)
    axes: Axes = figure.add_subplot()
    untouched, *rest = result.rows
    axes.axhline(100 * untouched.overall.value, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    widest = _cost(untouched, flops)
    axes.plot([widest], [100 * untouched.overall.value], "o", color=INK, label="untouched", markersize=5)
    # Lines that share their tokens would hide each other's bars: set each a little aside.
    labels = list(dict.fromkeys(row.label for row in rest))
    colours, greys = iter(COLOURS * (1 + len(labels) // len(COLOURS))), iter(GREYS * (1 + len(labels) // len(GREYS)))
    for number, name in enumerate(labels):
        rows = sorted((row for row in rest if row.label == name), key=lambda row: _cost(row, flops))
        aside = (number - (len(labels) - 1) / 2) * 0.004 * widest
        colour = next(greys) if rows[0].baseline else next(colours)
        _line(axes, rows, [_cost(row, flops) + aside for row in rows], colour, MARKS[number % len(MARKS)])
    words = f"vision tokens in a layer, mean over layers (of {untouched.total:.0f})"
    if flops:
        words = "multiply-adds of a prefill, % of the untouched model's"
    elif SMALLER in labels:
        words += f"; {SMALLER}: tokens' worth of pixels"
    label(axes, words, _measured(result))
    axes.set_xlim(0, max(_cost(row, flops) for row in result.rows) * 1.04)
    look(axes, grid="y")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _measured(result: Evaluation) -> str:
    return f"{result.measure} in %, {'ranked tasks' if result.ranked else 'all tasks, none of them ranked'}"


def _cost(row: ConditionRow, flops: bool) -> float:
    return 100 * row.flops_share if flops else row.average


def _told(row: ConditionRow, flops: bool) -> str:
    return f"{100 * row.flops_share:.0f} %" if flops else f"{row.average:.4g} tokens"


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
