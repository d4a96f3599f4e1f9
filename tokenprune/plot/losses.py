"""Losses of a fit, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.plot.style import BLUE, GREYS, INK, label, look, titled

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
    figure = titled(title, 6.4, 3.0)
    axes: Axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color=GREYS[2], linewidth=0.8, label="trained on")
    steps, held_out = zip(*looks, strict=True)
    axes.plot(steps, held_out, color=BLUE, linewidth=1.5, marker="o", markersize=3.5, label="held out")
    best = min(looks, key=lambda look_: look_[1])
    axes.annotate(
        f"{best[1]:.3g}", best, textcoords="offset points", xytext=(0, -12), ha="center", fontsize=8, color=INK
    )
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    label(axes, "step", "loss")
    look(axes)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
