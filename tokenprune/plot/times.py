"""Bars of time, as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune.plot.style import INK, SOFT_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.study.bench.result import Bench, SideRow

METHOD, PREFILL, DECODE = "#c2410c", "#3b5b92", "#c3cdd8"


def plot_times(result: Bench) -> Figure:
    """One bar for each side and batch size: the method, the rest of the prefill, decoding; medians over rounds.

    Behind each bar stands the speed-up of the prefill with its interval, and what the ledger allows.
    """
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row.batch for row in result.rows))
    sides = max(sum(row.batch == batch for row in result.rows) for batch in batches)
    figure = Figure(
        figsize=(8.2, 1.1 + len(batches) * (0.55 + 0.3 * sides)), dpi=150, layout="constrained", facecolor="white"
    )
    panels: Any = figure.subplots(len(batches), 1, squeeze=False)
    for axes, batch in zip(panels[:, 0], batches, strict=True):
        _panel(axes, [row for row in result.rows if row.batch == batch], decodes=result.new_tokens > 1)
        axes.set_title(f"batch of {batch}", loc="left", fontsize=8.5, color=SOFT_INK)
    panels[-1, 0].set_xlabel("seconds, median over rounds", color=SOFT_INK, fontsize=8.5)
    where = f"{result.device}, {result.dtype}, {result.attention}{', compiled' if result.compiled else ''}"
    title = f"{result.recipe} · {result.model} · {result.tokens} + {result.text} tokens · {where}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK, weight="bold")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _panel(axes: Axes, rows: list[SideRow], *, decodes: bool) -> None:
    places = range(len(rows))
    method = [row.method or 0.0 for row in rows]
    rest = [row.seconds("prefill") - own for row, own in zip(rows, method, strict=True)]
    axes.barh(places, method, color=METHOD, height=0.62, label="the recipe itself")
    axes.barh(places, rest, left=method, color=PREFILL, height=0.62, label="prefill")
    ends = [a + b for a, b in zip(method, rest, strict=True)]
    if decodes:
        decode = [row.seconds("decode") for row in rows]
        axes.barh(places, decode, left=ends, color=DECODE, height=0.62, label="decoding")
        ends = [a + b for a, b in zip(ends, decode, strict=True)]
    for place, row, end in zip(places, rows, ends, strict=True):
        found = row.speedup("prefill")
        if place and found is not None:
            known = found.low is not None and found.high is not None
            interval = f" ({found.low:.2f} … {found.high:.2f})" if known else ""
            text = f" {found.value:.2f}×{interval} of {row.ceiling():.2f}×"
            axes.text(end, place, text, va="center", fontsize=7.5, color=INK)
    axes.set_yticks(places, [row.name for row in rows], fontsize=8.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.32)
    axes.tick_params(axis="x", colors=SOFT_INK, labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
