"""Draws the pictures of the documentation into docs/images: python scripts/figures.py [stages] [budgets] [kept] [audit]

Nothing in them is made up: the stages picture runs the real parts on a toy picture, the budgets picture asks the real
solver, and the others are runs of the embedded model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle
from matplotlib.typing import ColorType

from tokenprune.builder import build
from tokenprune.core.needs import Needs
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.plot.style import COLOURS, INK, MERGED
from tokenprune.plot.style import SOFT_INK as SOFT
from tokenprune.stage import Stage, StageResult

IMAGES = Path(__file__).parent.parent / "docs" / "images"

LINE, PAPER = "#d5dae0", "#ffffff"
TEXT, QUESTION = "#aab4c0", "#f2a33a"
LOW, HIGH = np.array([0.86, 0.93, 0.92]), np.array([0.02, 0.42, 0.38])

SIDE = 7  # vision tokens along one side of the toy picture
BEFORE = ("USER", ":")
WORDS = ("where", "is", "the", "red", "circle", "?")
RATERS = ("red", "circle")
DEPTH, PLACES, KEEP = 32, (3, 16), (15, 6)
RECYCLERS: tuple[Recycler, ...] = (ClusterRecycler(share=0.5, per_cluster=6, plus_one=False), DropRecycler())


def scene() -> np.ndarray[Any, Any]:
    """The toy picture: a red disc and a blue square on a quiet ground, ``[112, 112, 3]``."""
    n = 16 * SIDE
    y, x = np.mgrid[0:n, 0:n] / n
    ground = np.stack([0.93 - 0.10 * y, 0.93 - 0.06 * y, 0.90 - 0.16 * y], axis=-1)
    ground += 0.012 * np.random.default_rng(1).standard_normal((n, n, 1))
    ground[(x - 0.68) ** 2 + (y - 0.33) ** 2 < 0.17**2] = (0.84, 0.22, 0.2)
    ground[(abs(x - 0.25) < 0.12) & (abs(y - 0.73) < 0.12)] = (0.25, 0.42, 0.8)
    return np.clip(ground, 0, 1)


class ToyScorer(Scorer):
    """Stands in for attention: interest in the disc, a little in the square."""

    reads = Needs(grid=True)

    def forward(self, tokens: Tokens, raters: torch.Tensor | None = None) -> torch.Tensor:
        y, x = ((tokens.cell[..., axis].float() + 0.5) / SIDE for axis in (1, 2))
        disc = torch.exp(-((x - 0.68) ** 2 + (y - 0.33) ** 2) / 0.045)
        square = 0.45 * torch.exp(-((x - 0.25) ** 2 + (y - 0.73) ** 2) / 0.02)
        return disc + square + 0.05 * torch.sin(37.0 * x + 91.0 * y)


def toy_stages() -> tuple[Tokens, list[StageResult]]:
    """The vision tokens of the toy picture, and what two real stages make of them."""
    picture = torch.tensor(scene()).float()
    patches = picture.unfold(0, 16, 16).unfold(1, 16, 16).mean((-1, -2)).reshape(1, SIDE * SIDE, 3)
    tokens = start = Tokens.from_hidden(patches, grid=(SIDE, SIDE))
    results = []
    for layer, keep, recycler in zip(PLACES, KEEP, RECYCLERS, strict=True):
        stage = Stage(
            place=Place("before_layer", layer),
            scorer=ToyScorer(),
            scheduler=FixedScheduler(keep=keep),
            sampler=TopKSampler(),
            recycler=recycler,
        )
        results.append(stage(tokens))
        tokens = results[-1].tokens
    return start, results


# ------------------------------------------------------------------------------------------------- the stages picture


def stages_picture() -> Figure:
    """A sequence that narrows over the decoder layers, and one stage of it taken apart."""
    start, results = toy_stages()
    alive = [start, *(result.tokens for result in results)]
    score = ToyScorer()(start)[0]
    shade = ((score - score.min()) / (score.max() - score.min())).clamp(0, 1).numpy()

    figure = Figure(figsize=(11, 8.3), dpi=160, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11), ylim=(0, 8.3))
    axes.axis("off")

    edges = [0, *PLACES, DEPTH]
    tops = (7.45, 5.9, 4.35)
    rows: list[dict[str, float]] = []
    for number, (tokens, y) in enumerate(zip(alive, tops, strict=True)):
        merged = set() if not number else set(results[number - 1].merged[0].tolist())
        if number == 2:
            merged = set(results[0].merged[0].tolist()) & set(tokens.origin[0].tolist())
        rows.append(_sequence(axes, tokens.origin[0].tolist(), merged, y, shade))
        _layers(axes, rows[-1], y, edges[number], edges[number + 1])
        _thumbnail(figure, 0.28, y - 0.67, tokens.origin[0].tolist(), merged)
        n = tokens.sizes[0]
        axes.text(9.62, y - 0.02, f"{n}", fontsize=19, weight="bold", color=tuple(HIGH), va="center")
        axes.text(9.62 + 0.17 * len(str(n)) + 0.1, y - 0.03, "vision tokens", fontsize=9.5, color=INK, va="center")
        axes.text(9.62, y - 0.3, f"+ {len(BEFORE) + len(WORDS)} text tokens", fontsize=8.5, color=SOFT, va="center")
        layers = edges[number + 1] - edges[number]
        axes.text(9.62, y - 0.5, f"in each of {layers} layers", fontsize=8.5, color=SOFT, va="center")
        if merged:
            made = f"({n - len(merged)} kept, {len(merged)} merged)"
            axes.text(9.62, y - 0.7, made, fontsize=8.5, color="#1287a3", va="center")
    for number, result in enumerate(results):
        _funnel(axes, rows[number], rows[number + 1], tops[number], tops[number + 1], result, alive[number])
        _stage_label(axes, (tops[number] + tops[number + 1]) / 2 - 0.42, PLACES[number])

    x = rows[0]["x0"]
    for name, first, last, color in (
        ("text", 0, len(BEFORE), TEXT),
        ("vision tokens, in raster order", len(BEFORE), len(BEFORE) + start.sizes[0], tuple(HIGH)),
        ("question", len(BEFORE) + start.sizes[0], len(BEFORE) + start.sizes[0] + len(WORDS), "#b8741a"),
    ):
        middle = x + (first + last) / 2 * rows[0]["step"]
        axes.text(middle, 7.78, name, fontsize=9.5, color=SOFT if name == "text" else color, ha="center", weight="bold")
    axes.text(0.28, 7.98, "the picture", fontsize=9.5, color=SOFT, weight="bold")
    _roles(figure, axes, start, results[0], shade)
    return figure


def _sequence(axes: Axes, origin: list[int], merged: set[int], y: float, shade: Any) -> dict[str, float]:
    """One row of cells: text, vision tokens, question. Returns where it starts, its step, and its end."""
    step = 0.133
    n = len(BEFORE) + len(origin) + len(WORDS)
    x0 = 5.5 - n * step / 2
    for place in range(n):
        x = x0 + place * step
        index = place - len(BEFORE)
        color: ColorType = TEXT
        if 0 <= index < len(origin):
            color = MERGED if origin[index] in merged else tuple(LOW + (HIGH - LOW) * shade[origin[index]])
        elif index >= 0:
            color = QUESTION
        axes.add_patch(Rectangle((x + 0.012, y - 0.11), step - 0.024, 0.22, facecolor=color, edgecolor="none"))
    return {"x0": x0, "step": step, "x1": x0 + n * step}


def _layers(axes: Axes, row: dict[str, float], y: float, first: int, last: int) -> None:
    box = FancyBboxPatch(
        (row["x0"] - 0.03, y - 0.56),
        row["x1"] - row["x0"] + 0.06,
        0.34,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor="#eef1f5",
        edgecolor=LINE,
        linewidth=0.9,
    )
    axes.add_patch(box)
    axes.text(5.5, y - 0.395, f"decoder layers {first} … {last - 1}", fontsize=9, color=INK, ha="center", va="center")


def _thumbnail(figure: Figure, x: float, y: float, origin: list[int], merged: set[int]) -> None:
    """The picture with what is left of it, at (x, y) inches."""
    axes = figure.add_axes((x / 11, y / 8.3, 0.92 / 11, 0.92 / 8.3))
    picture = scene()
    keep = np.zeros(SIDE * SIDE, dtype=bool)
    keep[[i for i in origin if i not in merged]] = True
    clear = np.kron(keep.reshape(SIDE, SIDE), np.ones((16, 16))).astype(bool)[..., None]
    axes.imshow(np.where(clear, picture, 0.93 + 0.05 * picture))
    lines = [((16 * i - 0.5, -0.5), (16 * i - 0.5, 16 * SIDE - 0.5)) for i in range(SIDE + 1)]
    lines += [((b, a), (d, c)) for ((a, b), (c, d)) in lines]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.7))
    for i in merged:
        axes.plot(16 * (i % SIDE) + 8, 16 * (i // SIDE) + 8, "o", ms=4.2, color=MERGED, mec=INK, mew=0.5)
    axes.set(xticks=[], yticks=[], xlim=(-1, 16 * SIDE), ylim=(16 * SIDE, -1))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _funnel(
    axes: Axes,
    above: dict[str, float],
    below: dict[str, float],
    y0: float,
    y1: float,
    result: StageResult,
    came: Tokens,
) -> None:
    """Lines from the tokens above a stage to where they stand below it."""
    before, after = came.origin[0].tolist(), result.tokens.origin[0].tolist()
    head = len(BEFORE)

    def line(i: int, j: int, color: ColorType, width: float, alpha: float) -> None:
        x0, x1 = (row["x0"] + (k + 0.5) * row["step"] for row, k in ((above, i), (below, j)))
        axes.plot([x0, x1], [y0 - 0.58, y1 + 0.13], color=color, lw=width, alpha=alpha, solid_capstyle="round")

    for k in range(head):
        line(k, k, TEXT, 1.1, 0.9)
    for k in range(len(WORDS)):
        line(head + len(before) + k, head + len(after) + k, QUESTION, 1.1, 0.75)
    anchors = {i for i in result.merged[0].tolist() if i >= 0}
    for old, new in _members(result, came).items():
        line(head + before.index(old), head + after.index(new), MERGED, 0.8, 0.75)
    for j, index in enumerate(after):
        if index not in anchors:
            line(head + before.index(index), head + j, tuple(HIGH), 1.0, 0.6)


def _members(result: StageResult, came: Tokens) -> dict[int, int]:
    """Recycled token to the anchor of the merged token that took it up, original indices; the first stage merges."""
    if not result.merged.numel():
        return {}
    assert result.scores is not None
    plan = RECYCLERS[0](came, result.kept, result.scores, result.kept.shape[1])
    assert plan is not None
    anchors = plan.target[0, plan.weight[0].int().argmax(0)]
    return dict(zip(plan.source[0].tolist(), anchors.tolist(), strict=True))


def _stage_label(axes: Axes, y: float, layer: int) -> None:
    box = {"boxstyle": "round,pad=0.35,rounding_size=0.6", "facecolor": INK, "edgecolor": "none"}
    text = f"stage · before_layer: {layer}"
    axes.text(1.42, y, text, fontsize=8.8, color="white", va="center", bbox=box, family="monospace")


ROLES = (
    ("raters", "whose opinion counts?", "raters: above_mean"),
    ("scorer", "what is each one worth?", "scorer: attention"),
    ("scheduler", "how many survive?", "scheduler: rank_ratio"),
    ("sampler", "which ones?", "sampler: top_k"),
    ("recycler", "what becomes of the rest?", "recycler: cluster"),
)


def _roles(figure: Figure, axes: Axes, start: Tokens, result: StageResult, shade: Any) -> None:
    """The first stage taken apart into its five roles."""
    axes.add_patch(
        FancyBboxPatch(
            (0.22, 0.2),
            10.56,
            2.92,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="#f6f8fa",
            edgecolor=LINE,
            linewidth=1,
        )
    )
    axes.text(0.45, 2.88, "inside a stage", fontsize=11, weight="bold", color=INK, va="center")
    axes.text(1.92, 2.88, "five roles, each one a line of the recipe", fontsize=9.5, color=SOFT, va="center")
    width, gap = 1.88, 0.21
    kept, merged = set(result.kept[0].tolist()), set(result.merged[0].tolist())
    members = _members(result, start)
    heat = [tuple(LOW + (HIGH - LOW) * each) for each in shade]
    for number, (role, question, line) in enumerate(ROLES):
        x = 0.4 + number * (width + gap)
        axes.add_patch(
            FancyBboxPatch(
                (x, 0.36),
                width,
                2.28,
                boxstyle="round,pad=0,rounding_size=0.09",
                facecolor=PAPER,
                edgecolor=LINE,
                linewidth=1,
            )
        )
        axes.text(x + 0.14, 2.43, role, fontsize=11.5, weight="bold", color=INK, va="center")
        axes.text(x + 0.14, 2.2, question, fontsize=8.6, color=SOFT, va="center")
        axes.text(x + 0.14, 0.53, line, fontsize=7.6, color=tuple(HIGH), va="center", family="monospace")
        if number:
            axes.add_patch(
                ConnectionPatch(
                    (x - gap + 0.02, 1.5),
                    (x - 0.02, 1.5),
                    "data",
                    "data",
                    axesA=axes,
                    axesB=axes,
                    arrowstyle="-|>",
                    mutation_scale=11,
                    color=SOFT,
                    lw=1.3,
                )
            )
        middle = x + width / 2
        if role == "raters":
            _question(axes, x + 0.14)
        elif role == "scorer":
            _cells(axes, middle, heat)
        elif role == "scheduler":
            _counter(axes, middle, len(kept), start.sizes[0])
        elif role == "sampler":
            _cells(axes, middle, [heat[i] if i in kept else "#eceff2" for i in range(SIDE * SIDE)], outline=kept)
        else:
            recycled = ["#c9eef6" if i in members else "#eceff2" for i in range(SIDE * SIDE)]
            _cells(axes, middle, recycled, dots=merged, members=members)


def _question(axes: Axes, x: float) -> None:
    """The words of the question; those that rate stand out."""
    for number, word in enumerate(WORDS):
        column, row = number % 2, number // 2
        rates = word in RATERS
        box = {
            "boxstyle": "round,pad=0.28,rounding_size=0.25",
            "facecolor": QUESTION if rates else "#f4f1ec",
            "edgecolor": "none",
        }
        axes.text(
            x + 0.4 + 0.82 * column,
            1.82 - 0.36 * row,
            word,
            fontsize=9,
            ha="center",
            va="center",
            color=INK if rates else "#a09a90",
            weight="bold" if rates else "normal",
            bbox=box,
        )


def _counter(axes: Axes, x: float, kept: int, total: int) -> None:
    axes.text(x, 1.6, f"{kept}", fontsize=30, weight="bold", color=tuple(HIGH), ha="center", va="center")
    axes.text(x, 1.2, f"of {total}", fontsize=10.5, color=SOFT, ha="center", va="center")
    for i, color in enumerate([tuple(HIGH)] * kept + ["#dfe4e9"] * (total - kept)):
        axes.add_patch(Rectangle((x - 0.735 + i * 0.03, 0.9), 0.022, 0.13, facecolor=color, edgecolor="none"))


def _cells(
    axes: Axes,
    x: float,
    colors: Sequence[ColorType],
    *,
    outline: set[int] | None = None,
    dots: set[int] | None = None,
    members: dict[int, int] | None = None,
) -> None:
    """The grid of vision tokens around (x, 1.4)."""
    step = 0.178
    x0, y0 = x - SIDE * step / 2, 1.42 + SIDE * step / 2

    def centre(i: int) -> tuple[float, float]:
        return x0 + (i % SIDE + 0.5) * step, y0 - (i // SIDE + 0.5) * step

    for i in range(SIDE * SIDE):
        cx, cy = centre(i)
        edge = "#ff8c1a" if outline and i in outline else "none"
        size = step - 0.026
        axes.add_patch(
            Rectangle((cx - size / 2, cy - size / 2), size, size, facecolor=colors[i], edgecolor=edge, linewidth=1.1)
        )
    for old, new in (members or {}).items():
        (ax, ay), (bx, by) = centre(old), centre(new)
        axes.plot([ax, bx], [ay, by], color=MERGED, lw=0.9, zorder=3)
    for i in dots or ():
        axes.plot(*centre(i), "o", ms=6, color=MERGED, mec=INK, mew=0.6, zorder=4)


# ------------------------------------------------------------------------------------------------- the budgets picture


def budgets_picture(recipe: str = "sparsevlm-plus", tokens: int = 128, total: int = 576, depth: int = 32) -> Figure:
    """Vision tokens that enter each layer when "so many tokens" means keep, average or final."""
    from tokenprune.budget import tokens_per_layer

    figure = Figure(figsize=(9.2, 3.6), dpi=160, facecolor=PAPER)
    axes = figure.add_axes((0.075, 0.15, 0.9, 0.78))
    colors = dict(zip(("keep", "average", "final"), COLOURS, strict=False))
    side = int(total**0.5)
    layers = np.arange(depth + 1)
    ends: list[float] = []
    for kind, color in colors.items():
        pipeline = build(recipe, depth=depth, **{kind: tokens})  # type: ignore[arg-type]
        counts = [c for c in pipeline.plan(total, [(1, side, side)]) if c is not None]
        entering = tokens_per_layer(pipeline.steps(), counts, depth, total)
        numbers = pipeline.summary(total, [(1, side, side)])
        axes.step(layers, [*entering, entering[-1]], where="post", color=color, lw=2.2, solid_joinstyle="miter")
        label = f"{kind}: {tokens}"
        detail = f"average {numbers.average:.0f}, keep {numbers.keep:.0f}, final {numbers.final}"
        y = 520 - 62 * len(ends)
        ends.append(y)
        axes.plot([11.6, 12.6], [y, y], color=color, lw=3)
        axes.text(13, y, label, fontsize=10.5, color=color, weight="bold", va="center", family="monospace")
        axes.text(18.2, y, detail, fontsize=9.5, color=SOFT, va="center")
    axes.set(xlim=(0, depth), ylim=(0, 600))
    axes.set_xticks([0, *PLACES, 7, depth])
    axes.set_yticks([0, tokens, total])
    axes.axhline(tokens, color=LINE, lw=1, zorder=0)
    axes.set_xlabel("decoder layer", color=SOFT, fontsize=9.5)
    axes.set_ylabel("vision tokens that enter it", color=SOFT, fontsize=9.5)
    axes.tick_params(colors=SOFT, labelsize=9)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(LINE)
    return figure


# ---------------------------------------------------------------------------------------------------- the kept picture


def kept_picture() -> Figure:
    """What `sparsevlm` keeps of a sample picture in the embedded model: the first sample that it answers correctly."""
    from PIL import Image

    import tokenprune as tp
    from tokenprune.plot.kept import plot_kept
    from tokenprune.scenes import load_embedded, samples

    model, processor = load_embedded()
    for sample in samples():
        picture = Image.open(sample.path).convert("RGB")
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        with tp.attach(model, "sparsevlm") as pruned, torch.inference_mode():
            output = model.generate(**inputs)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if answer == sample.answer:
            return plot_kept(picture, pruned.report, title=f"sparsevlm · {sample.question} → {answer}")
    raise SystemExit("sparsevlm answers no sample correctly")


# --------------------------------------------------------------------------------------------------- the audit picture


def audit_picture(recipe: str = "feather", scenes: int = 50) -> Figure:
    """Where the recipe keeps tokens over held-out scenes, as `tokenprune audit` asks about them."""
    import tokenprune as tp
    from tokenprune.plot.audit import plot_audit
    from tokenprune.scenes.cases import localisation_cases
    from tokenprune.study.audit import audit_cases

    survey = audit_cases(tp.load("embedded"), tp.load_recipe(recipe), islice(localisation_cases(), scenes))
    return plot_audit(survey.audit.stages, title=f"{recipe} · embedded model · {scenes} scenes")


DRAWN = {"stages": stages_picture, "budgets": budgets_picture, "kept": kept_picture, "audit": audit_picture}


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or DRAWN:
        DRAWN[name]().savefig(IMAGES / f"{name}.png", metadata={"Software": None})
        print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main()
