"""Pictures of docs/scenes.md: some scenes, and the training curve of the shipped weights.

python benchmarks/scenes/pictures.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image

from tokenprune.plot.style import COLOURS, INK, SOFT_INK
from tokenprune.scenes import TASKS, TEST_SEEDS
from tokenprune.scenes.world.generate import scene

LOG = Path(__file__).with_name("training_log.jsonl")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHEET_SEED = TEST_SEEDS[8]
SMOOTHED = 5


def sheet(columns: int = 6, rows: int = 2, side: int = 192) -> Image.Image:
    """The first scenes of a held-out stream."""
    pictures = [scene(SHEET_SEED, index).render(side) for index in range(columns * rows)]
    lines = [np.concatenate(pictures[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
    return Image.fromarray(np.concatenate(lines))


def curve(log: list[dict[str, Any]]) -> Figure:
    """Losses and training accuracy over time, with the borders of its phases."""
    figure = Figure(figsize=(8.4, 5.6), dpi=150, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True)
    minutes = np.array([line["seconds"] / 60 for line in log])
    _lines(above, minutes, log, "loss", list(dict.fromkeys(name for line in log for name in line["loss"])))
    above.set_yscale("log")
    above.yaxis.set_major_formatter(ScalarFormatter())
    above.yaxis.set_minor_formatter(NullFormatter())
    above.set_yticks([0.05, 0.1, 0.3, 1, 3])
    above.set_ylabel("loss", color=SOFT_INK, fontsize=8.5)
    _lines(below, minutes, log, "accuracy", list(TASKS))
    below.set_ylim(0, 1.02)
    below.set_ylabel("answered right in training", color=SOFT_INK, fontsize=8.5)
    below.set_xlabel("minutes of one CPU core", color=SOFT_INK, fontsize=8.5)
    names = [line["stage"] for line in log]
    for number, name in enumerate(names):
        if number == 0 or names[number - 1] != name:
            start = minutes[number - 1] if number else 0.0
            above.text(start, 1.02, name, transform=above.get_xaxis_transform(), fontsize=8, color=INK)
            for axes in (above, below):
                axes.axvline(start, color=INK, linewidth=0.7, linestyle=":")
    for axes in (above, below):
        axes.tick_params(colors=SOFT_INK, labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _lines(axes: Axes, minutes: Any, log: list[dict[str, Any]], what: str, names: list[str]) -> None:
    for number, name in enumerate(names):
        # A phase without this number breaks the line.
        values = np.array([line[what].get(name, np.nan) for line in log])
        smooth = np.array([values[max(0, i - SMOOTHED + 1) : i + 1].mean() for i in range(len(values))])
        style = "-" if number < len(COLOURS) else "--"
        axes.plot(minutes, smooth, style, color=COLOURS[number % len(COLOURS)], linewidth=1.2, label=name)


if __name__ == "__main__":
    sheet().save(IMAGES / "scenes.png", optimize=True)
    lines = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    curve(lines).savefig(IMAGES / "training.png", metadata={"Software": None})
