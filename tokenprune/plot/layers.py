"""Stacked bars of a ledger: what each decoder layer costs with a recipe, before the outline of the untouched model."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from tokenprune.plot.style import BLUE, GREYS, INK, METHOD, SKY, heading, heading_height, label, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.cost.account import Ledger

GIGA = 1e-9


def plot_layers(ledger: Ledger, *, width: float = 8.0, height: float = 3.4) -> Figure:
    """One bar for each decoder layer of the prefill: linear, attention, and the stages that act before it.

    The shaded outline is the untouched model. Numbers stand above the first of equal layers, and above the outline.

    Args:
        ledger: as `tokenprune.ledger` returns it.
        width: inches.
        height: inches, without the title.
    """
    from matplotlib.figure import Figure

    about = "" if ledger.exact else "≈"
    decoder, prefill = (f"{about}{ledger.share(view):.1%}" for view in ("decoder", "prefill"))
    title = f"{ledger.recipe} on {ledger.model}: {decoder} of the decoder layers, {prefill} of the whole prefill"
    above = heading_height(title, width)
    size = (width, height + above)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    heading(figure, title)
    axes: Axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.66 / size[1], top=1 - (above + 0.05) / size[1])
    rows = ledger.reduced.rows
    layers = [row.layer for row in rows]
    untouched = [row.total * GIGA for row in ledger.untouched.rows]
    edges = [at - 0.5 for at in [*layers, len(layers)]]
    axes.stairs(untouched, edges, fill=True, color=GREYS[3], alpha=0.35)
    axes.stairs(untouched, edges, color=INK, linewidth=1.3, label="untouched", zorder=3)
    method = [sum(stage.total for stage in ledger.reduced.stages if stage.layer == at) * GIGA for at in layers]
    linear, attention = [row.linear * GIGA for row in rows], [row.attention * GIGA for row in rows]
    below = [a + b for a, b in zip(linear, attention, strict=True)]
    axes.bar(layers, linear, color=BLUE, label="projections and MLP")
    axes.bar(layers, attention, bottom=linear, color=SKY, label="attention")
    if any(method):
        axes.bar(layers, method, bottom=below, color=METHOD, label="the recipe itself")
    highest = max(untouched, default=0.0)
    for _, same in groupby(zip(layers, below, method, strict=True), key=lambda layer: f"{layer[1]:.4g}"):
        first, cost, own = next(same)
        if cost < 0.93 * highest:  # the number of the outline stands there
            axes.text(first - 0.4, cost + own + 0.012 * highest, f"{cost:.3g}", fontsize=7.5, color=INK, va="bottom")
    axes.text(len(layers) - 0.6, 1.015 * highest, f"{highest:.3g}", fontsize=7.5, color=INK, ha="right", va="bottom")
    axes.set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, 1.12 * highest or 1.0))
    label(axes, "decoder layer", "G multiply-adds")
    look(axes)
    figure.legend(loc="lower left", bbox_to_anchor=(0.006, 0.0), ncols=4, fontsize=7.5, frameon=False, labelcolor=INK)
    return figure
