"""Bars of time, as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune.plot.style import BLUE, GREYS, INK, METHOD, heading, heading_height, label, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.study.bench.result import Bench, SideRow

WIDTH = 8.2
READABLE = 0.09
"""Share of the axes that a piece of a bar must have to hold its time in writing."""


def plot_times(result: Bench) -> Figure:
    """One bar for each side and batch size: the method, the rest of the prefill, decoding; medians over rounds.

    Each piece holds its time. Behind a bar stands the speed-up of the prefill with its interval, and the most that the
    ledger allows.
    """
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row.batch for row in result.rows))
    sides = max(sum(row.batch == batch for row in result.rows) for batch in batches)
    where = f"{result.device}, {result.dtype}, {result.attention}{', compiled' if result.compiled else ''}"
    title = f"{result.recipe} · {result.model} · {result.tokens} + {result.text} tokens · {where}"
    above, below, gap = heading_height(title, WIDTH) + 0.25, 0.85, 0.45
    each = 0.12 + 0.32 * sides
    size = (WIDTH, above + below + len(batches) * each + (len(batches) - 1) * gap)
    figure = Figure(figsize=size, dpi=150, facecolor="white")
    heading(figure, title)
    panels: Any = figure.subplots(len(batches), 1, squeeze=False)
    longest = max(len(row.name) for row in result.rows)
    left = (0.3 + 0.075 * longest) / size[0]
    figure.subplots_adjust(left=left, right=0.985, top=1 - above / size[1], bottom=below / size[1], hspace=gap / each)
    for axes, batch in zip(panels[:, 0], batches, strict=True):
        _panel(axes, [row for row in result.rows if row.batch == batch], decodes=result.new_tokens > 1)
        axes.set_title(f"batch of {batch}", loc="left", fontsize=8.5, color=INK)
    label(panels[-1, 0], "seconds, median over rounds · behind a bar: how many times as fast the prefill is")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    at: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.006, 0.0)}
    figure.legend(handles, labels, ncols=3, frameon=False, fontsize=8, labelcolor=INK, **at)
    return figure


def _panel(axes: Axes, rows: list[SideRow], *, decodes: bool) -> None:
    method = [row.method or 0.0 for row in rows]
    rest = [row.seconds("prefill") - own for row, own in zip(rows, method, strict=True)]
    pieces = [("the recipe itself", METHOD, "white", method), ("prefill without it", BLUE, "white", rest)]
    if decodes:
        pieces.append(("decoding", GREYS[3], INK, [row.seconds("decode") for row in rows]))
    ends = [0.0] * len(rows)
    room = 1.45 * max(sum(times) for times in zip(*(piece[-1] for piece in pieces), strict=True))
    for name, colour, ink, times in pieces:
        axes.barh(range(len(rows)), times, left=ends, color=colour, height=0.66, label=name)
        for place, (start, seconds) in enumerate(zip(ends, times, strict=True)):
            if seconds > READABLE * room:
                axes.text(start + seconds / 2, place, _time(seconds), fontsize=7, color=ink, ha="center", va="center")
        ends = [a + b for a, b in zip(ends, times, strict=True)]
    for place, row, end in zip(range(len(rows)), rows, ends, strict=True):
        found = row.speedup("prefill")
        if place and found is not None:
            known = found.low is not None and found.high is not None
            interval = f" ({found.low:.2f}–{found.high:.2f})" if known else ""
            text = f" {found.value:.2f}×{interval}, at most {row.ceiling():.2f}×"
            axes.text(end, place, text, va="center", fontsize=7.5, color=INK)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, room)
    look(axes)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
