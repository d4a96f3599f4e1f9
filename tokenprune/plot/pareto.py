"""What a search tried and what it found: right answers over multiply-adds, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.plot.style import COLOURS, GREYS, INK, MARKS, caption, label, look, titled
from tokenprune.study.tune.result import WINNER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.study.cases import Case
    from tokenprune.study.evaluate import ConditionRow
    from tokenprune.study.tune.result import Tuned

FOUND = COLOURS[0]


def plot_pareto(tuned: Tuned, *, title: str | None = None) -> Figure:
    """Draw a search: left all that it tried, with the line of those that nothing beats; right the report.

    Left and right are about different pictures, so heights are compared within a panel only. Bars are 95 % intervals;
    differences are more certain than they suggest, because all answer the same questions.

    Args:
        tuned: from `tune`.
        title: text above the panels.
    """
    figure = titled(title, 9.6, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    _tried(left, tuned)
    _reported(right, tuned)
    for axes in (left, right):
        label(axes, "multiply-adds of a prefill, % of the untouched model's")
        look(axes, grid="y")
        axes.margins(x=0.08, y=0.08)
    label(left, left.get_xlabel(), f"{tuned.report.measure} in %")
    left.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    right.legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _tried(axes: Axes, tuned: Tuned) -> None:
    caption(axes, f"tried: {len(tuned.candidates)} recipes", _asked(tuned.chosen_on))
    points: dict[str, Any] = {"color": GREYS[2], "markersize": 4.5, "zorder": 2}
    others = [each for each in tuned.candidates if each is not tuned.winner]
    axes.plot([100 * each.flops_share for each in others], [100 * each.right.value for each in others], "o", **points)
    front = tuned.front
    axes.plot(
        [100 * each.flops_share for each in front],
        [100 * each.right.value for each in front],
        drawstyle="steps-post",
        marker="o",
        markersize=4.5,
        color=FOUND,
        linewidth=1.3,
        label="nothing is cheaper and better",
        zorder=3,
    )
    best = tuned.winner
    axes.plot(
        [100 * best.flops_share], [100 * best.right.value], "*", color=FOUND, markersize=12, label=WINNER, zorder=4
    )


def _reported(axes: Axes, tuned: Tuned) -> None:
    caption(axes, "reported: on other pictures", _asked(tuned.report.cases))
    greys, colours = iter(GREYS), iter(COLOURS[1:])
    for number, row in enumerate(tuned.report.rows):
        if row.label == "untouched":
            axes.axhline(100 * row.overall.value, color=INK, linewidth=0.8, linestyle=":", label=row.label, zorder=1)
        elif row.label == WINNER:
            _bar(axes, row, FOUND, "*", 12)
        else:
            _bar(axes, row, next(greys) if row.baseline else next(colours), MARKS[number % len(MARKS)], 5)


def _bar(axes: Axes, row: ConditionRow, colour: str, mark: str, size: float) -> None:
    value, (low, high) = row.overall.value, row.overall.ends
    axes.errorbar(
        [100 * row.flops_share],
        [100 * value],
        yerr=[[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]],
        label=row.label,
        color=colour,
        marker=mark,
        markersize=size,
        elinewidth=0.8,
        linestyle="none",
        zorder=4 if row.label == WINNER else 3,
    )


def _asked(cases: Sequence[Case]) -> str:
    return f"{len(cases)} questions about {len({case.picture_id for case in cases})} pictures"
