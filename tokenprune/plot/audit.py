"""Picture of an audit: a heat map of each stage, with the profiles of its rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.core.place import place_name
from tokenprune.errors import InputError
from tokenprune.plot.style import SKY, SOFT_INK, VERMILION, caption, heading, heading_height
from tokenprune.study.audit import StageAudit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"
"""Even to the eye, and in grey."""
BARS = SKY
EVEN = VERMILION
"""What every place would show if position had no say."""
LEGEND = """colour, bars: share of the tokens there that were kept
dashed: the same if place had no say · ◀ mean height of kept"""


def plot_audit(stages: Sequence[StageAudit], *, title: str | None = None, panel: float = 2.6) -> Figure:
    """Draw how often each place of the picture was kept, stage by stage.

    Each stage has a colour scale of its own, from 0 to its highest place, or twice its keep share where that is more,
    so that an even map does not look uneven. Bars at the side and below are the shares of rows and columns that were
    kept, from 0; a dashed line marks the stage's keep share, a triangle the mean height.

    Args:
        stages: `tokenprune.study.audit.Audit.stages`.
        title: text above the panels.
        panel: height of a heat map in inches.

    Raises:
        InputError: nothing to draw.
    """
    from matplotlib.figure import Figure

    if not stages:
        raise InputError("plot: the audit has no stage to draw")
    height, width = stages[0].heat.shape
    wide = panel * min(max(width / height, 0.5), 2.0)
    side, gap, below = 0.8, 0.75, 1.1
    left, each = 0.3, wide + 0.08 + side + gap
    width_of_all = left + each * len(stages)
    above = 0.5 + heading_height(title, width_of_all)
    size = (width_of_all, panel + below + above)
    figure = Figure(figsize=size, dpi=160, facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> Any:
        """Axes from inches."""
        return figure.add_axes((x / size[0], y / size[1], w / size[0], h / size[1]))

    for number, stage in enumerate(stages):
        x = left + each * number
        heat = place(x, below, wide, panel)
        most = max(1e-9, float(stage.heat.max()), min(1.0, 2 * stage.keep))
        drawn = heat.imshow(stage.heat, cmap=COLOURS, vmin=0, vmax=most, aspect="auto", interpolation="nearest")
        heat.set(xticks=[], yticks=[])
        _caption(heat, stage)
        _mean(heat, stage, height)
        _rows(place(x + wide + 0.08, below, side, panel), stage)
        _columns(place(x, below - 0.08 - 0.5, wide, 0.5), stage)
        scale = figure.colorbar(drawn, cax=place(x + wide + 0.16 + side, below, 0.09, panel))
        scale.outline.set_visible(False)
        scale.ax.tick_params(labelsize=7, colors=SOFT_INK, length=2)
        scale.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.text(left / size[0], 0.12 / size[1], LEGEND, fontsize=7.5, color=SOFT_INK, linespacing=1.4)
    heading(figure, title, left=left / size[0])
    return figure


def _caption(axes: Axes, stage: StageAudit) -> None:
    bias = stage.rows.bias
    note = f"kept {stage.kept:.4g} of {stage.tokens:.4g}" + (f" + {stage.merged:.4g} merged" if stage.merged else "")
    note += "" if bias is None else f" · bias {bias.value:+.2f}"
    caption(axes, place_name(stage.place, stage.layer), note)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _mean(axes: Axes, stage: StageAudit, height: int) -> None:
    if stage.rows.mean is not None:
        y = stage.rows.mean.value * height - 0.5
        axes.plot([1.0], [y], marker="<", markersize=6, color=EVEN, clip_on=False, transform=axes.get_yaxis_transform())


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], facecolor="none")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _rows(axes: Axes, stage: StageAudit) -> None:
    count = len(stage.rows.profile)
    axes.barh(range(count), stage.rows.profile, height=0.82, color=BARS)
    axes.axvline(stage.keep, color=EVEN, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set(xlim=(0, _longest(stage.rows.profile)), ylim=(count - 0.5, -0.5))
    _bare(axes)


def _columns(axes: Axes, stage: StageAudit) -> None:
    count = len(stage.columns.profile)
    axes.bar(range(count), stage.columns.profile, width=0.82, color=BARS)
    axes.axhline(stage.keep, color=EVEN, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set(xlim=(-0.5, count - 0.5), ylim=(_longest(stage.columns.profile), 0))
    _bare(axes)


def _longest(profile: Sequence[float]) -> float:
    """Where the scale of the bars ends."""
    return 1.12 * max(*profile, 1e-9)
