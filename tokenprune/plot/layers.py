"""Stacked bars of a ledger: what each decoder layer costs with a recipe, before the outline of the untouched model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.plot.style import INK, MERGED, SOFT_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenprune.cost.account import Ledger

LINEAR = "#3b5b92"
ATTENTION = "#8fb3e0"


def plot_layers(ledger: Ledger, *, width: float = 8.0, height: float = 3.4) -> Figure:
    """One bar for each decoder layer of the prefill: linear, attention, and the stages that act before it.

    Args:
        ledger: as `tokenprune.ledger` returns it.
        width: inches.
        height: inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    axes: Axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.2, top=0.86)
    rows = ledger.reduced.rows
    layers = [row.layer for row in rows]
    giga = 1e-9
    method = [sum(stage.total for stage in ledger.reduced.stages if stage.layer == at) * giga for at in layers]
    linear, attention = [row.linear * giga for row in rows], [row.attention * giga for row in rows]
    below = [a + b for a, b in zip(linear, attention, strict=True)]
    axes.bar(layers, linear, color=LINEAR, label="projections and MLP")
    axes.bar(layers, attention, bottom=linear, color=ATTENTION, label="attention")
    if any(method):
        axes.bar(layers, method, bottom=below, color=MERGED, label="the recipe itself")
    untouched = [row.total * giga for row in ledger.untouched.rows]
    edges = [at - 0.5 for at in [*layers, len(layers)]]
    axes.stairs(untouched, edges, color=INK, linewidth=0.9, label="untouched")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.margins(y=0.05)
    axes.set_xlabel("decoder layer", fontsize=8, color=SOFT_INK)
    axes.set_ylabel("G multiply-adds", fontsize=8, color=SOFT_INK)
    axes.tick_params(labelsize=7.5, colors=SOFT_INK)
    axes.spines[["top", "right"]].set_visible(False)
    about = "" if ledger.exact else "≈"
    title = f"{ledger.recipe} on {ledger.model}: {about}{ledger.share('prompt'):.1%} of the untouched prefill"
    figure.text(0.012, 0.93, title, fontsize=10, color=INK, ha="left", va="baseline", parse_math=False)
    figure.legend(
        loc="lower left", bbox_to_anchor=(0.006, 0.0), ncols=4, fontsize=7.5, frameon=False, labelcolor=SOFT_INK
    )
    return figure
