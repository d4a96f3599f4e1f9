"""What all figures share, and what each one writes: nothing stretched, cut off, or told by colour alone."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import tokenprune as tp
from tokenprune.plot.accuracy import plot_accuracy
from tokenprune.plot.kept import plot_kept
from tokenprune.plot.layers import plot_layers
from tokenprune.plot.style import COLOURS, wrap
from tokenprune.plot.times import plot_times
from tokenprune.study.bench import Bench, SideRow
from tokenprune.study.bench.clock import Sample
from tokenprune.study.statistics import Estimate

EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Linear RGB as eyes without one kind of cones see it: Machado, Oliveira and Fernandes (2009), severity 1."""


def lab(colour: str, eye: Any) -> Any:
    """CIE L*a*b* of a colour, as this eye sees it."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(eye) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ seen / to_xyz.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_colours_are_told_apart_by_every_eye(eye: str) -> None:
    """2.3 is a difference that is just seen; pale and dark variants of one colour are 10 apart."""
    seen = {colour: lab(colour, EYES[eye]) for colour in COLOURS}
    near = min((float(np.linalg.norm(seen[a] - seen[b])), a, b) for a, b in combinations(COLOURS, 2))
    assert near[0] > 10, near


def test_headings_are_wrapped_then_cut() -> None:
    assert wrap("", 8) == [] and wrap("one line", 8) == ["one line"]
    long = wrap("sparsevlm · what is it ? → " + "a long answer " * 60, 6.0)
    assert len(long) == 4 and long[-1].endswith(" …") and max(map(len, long)) <= 66
    assert wrap("first\nsecond", 8) == ["first second"]


def test_titles_stay_inside_their_figure() -> None:
    stage = SimpleNamespace(place="before_layer: 2", layer=2, kept=torch.tensor([[0, 5]]), merged=torch.tensor([[-1]]))
    report = SimpleNamespace(stages=[stage], grids=(((1, 4, 4),),), total=(16,))
    figure = plot_kept(Image.new("RGB", (60, 60)), report, title="uniform · $what$ is it ? → " + "word " * 40)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (title,) = figure.texts
    assert "\n" in title.get_text()
    box, page = title.get_window_extent(canvas.get_renderer()), figure.bbox
    assert box.x0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    heads = [text for axes in figure.axes for text in axes.texts]
    assert box.y0 > max(head.get_window_extent(canvas.get_renderer()).y1 for head in heads if head.get_text())


@pytest.mark.parametrize("size", [(400, 80), (90, 300), (120, 120)])
def test_photographs_keep_their_shape(size: tuple[int, int]) -> None:
    """Also those far wider than any panel, whose cells are not square."""
    stage = SimpleNamespace(place="before_layer: 2", layer=2, kept=torch.tensor([[0, 5]]), merged=torch.tensor([[-1]]))
    report = SimpleNamespace(stages=[stage], grids=(((1, 4, 6),),), total=(24,))
    figure = plot_kept(Image.new("RGB", size), report)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(size[0] / size[1], rel=0.01)


def row(label: str, value: float, budget: str = "keep: 0.5", baseline: bool = False, average: float = 72) -> Any:
    overall = Estimate(value, value - 0.05, value + 0.05)
    return SimpleNamespace(
        label=label, budget=budget, baseline=baseline, overall=overall, average=average, flops_share=0.5, total=144
    )


def test_one_budget_is_drawn_as_sorted_dots_with_intervals() -> None:
    rows = [row("untouched", 0.9, ""), row("b", 0.4), row("random", 0.6, baseline=True), row("a", 0.8)]
    figure = plot_accuracy(SimpleNamespace(rows=rows, measure="accuracy", ranked=("colour",)))
    (axes,) = figure.axes
    names = [text.get_text().split()[0] for text in axes.get_yticklabels()]
    assert names == ["untouched", "a", "random", "b"]
    assert [text.get_text() for text in axes.texts] == ["90.0", "80.0", "60.0", "40.0"]
    bars = [line for line in axes.lines if len(set(line.get_xdata())) == 2 and len(set(line.get_ydata())) == 1]
    assert [pytest.approx(bar.get_xdata()) for bar in bars] == [[85, 95], [75, 85], [55, 65], [35, 45]]
    assert "b  ·  72 tokens" in [text.get_text() for text in axes.get_yticklabels()]


def test_several_budgets_are_drawn_as_lines() -> None:
    rows = [row("untouched", 0.9, ""), row("a", 0.8), row("a", 0.7, "keep: 0.25", average=36)]
    (axes,) = plot_accuracy(SimpleNamespace(rows=rows, measure="accuracy", ranked=())).axes
    assert axes.get_xlabel().startswith("vision tokens in a layer") and not axes.texts
    assert axes.get_ylabel() == "accuracy in %, all tasks, none of them ranked"


def test_layers_show_the_untouched_outline_and_numbers() -> None:
    told = tp.ledger("llava-1.5-7b", tp.load_recipe("fastv", keep=0.25))
    figure = plot_layers(told)
    (axes,) = figure.axes
    untouched = told.untouched.rows[0].total / 1e9
    assert axes.get_ylim()[1] > 1.1 * untouched, "the outline lies inside the axes"
    written = [text.get_text() for text in axes.texts]
    late = told.reduced.rows[-1]
    assert written[-1] == f"{untouched:.3g}" and f"{(late.linear + late.attention) / 1e9:.3g}" in written
    (title,) = figure.texts
    shares = f"{told.share('decoder'):.1%} of the decoder layers, {told.share('prefill'):.1%} of the whole prefill"
    assert " ".join(title.get_text().split()).endswith(shares)
    assert told.share("decoder") < told.share("prefill"), "two numbers, and each is called what it is"


def test_bars_of_time_say_what_they_are() -> None:
    def samples(prefill: float) -> tuple[Sample, ...]:
        return tuple(Sample(prefill=prefill, vision=0.0, decode=0.2, method=0.001, peak=None) for _ in range(5))

    ledger = tp.ledger("llava-1.5-7b", "fastv")
    sides = [
        SideRow(name, 1, 9.0, samples(t), samples(0.4), ledger) for name, t in (("untouched", 0.4), ("fastv", 0.2))
    ]
    figure = plot_times(Bench("m", "fastv", None, "f", 9, 9, 9, 4, "sdpa", False, "float32", "cpu", sides))
    written = [text.get_text().strip() for text in figure.axes[0].texts]
    assert written == ["399 ms", "199 ms", "200 ms", "200 ms", f"2.00× (2.00–2.00), at most {sides[1].ceiling():.2f}×"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["the recipe itself", "prefill without it", "decoding"]
