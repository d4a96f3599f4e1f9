"""Losses of a fit, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.plot.style import INK, SOFT_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_losses(losses: Sequence[float], looks: Sequence[tuple[int, float]], *, title: str = "") -> Figure:
    """A figure of the loss of every step and of the looks at held-out questions; the best look is marked.

    Args:
        losses: of steps 1, 2, …
        looks: (step, loss).
        title: text above the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color=SOFT_INK, linewidth=0.7, alpha=0.6, label="trained on")
    steps, held_out = zip(*looks, strict=True)
    axes.plot(steps, held_out, color=INK, linewidth=1.4, marker="o", markersize=3, label="held out")
    best = min(looks, key=lambda look: look[1])
    axes.annotate(
        f"{best[1]:.3g}", best, textcoords="offset points", xytext=(0, -12), ha="center", fontsize=8, color=INK
    )
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", fontsize=8, color=SOFT_INK)
    axes.set_ylabel("loss", fontsize=8, color=SOFT_INK)
    axes.tick_params(labelsize=7.5, colors=SOFT_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    if title:
        axes.set_title(title, loc="left", fontsize=9, color=INK)
    return figure
