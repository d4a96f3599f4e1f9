"""Draws what every recipe keeps of the same three pictures, and writes docs/gallery.md: python scripts/gallery.py

The embedded model, a quarter of the tokens (`keep: 0.25`). A panel shows the vision tokens behind the recipe's last
stage that keeps any. A recipe that a still picture gives nothing to is named with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import tokenprune as tp
from tokenprune.core.frames import frames_of
from tokenprune.errors import TokenPruneError
from tokenprune.plot.kept import draw
from tokenprune.plot.style import INK, SOFT_INK, save
from tokenprune.recipe import list_recipes
from tokenprune.scenes import samples

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
SHARE = 0.25
PICTURES = (0, 2, 4)
"""Numbers of the shipped samples."""
PER_SHEET, PER_LINE = 12, 2
"""Recipes on one image, and beside each other."""
PANEL = 1.25
"""Inches."""

Kept = list[tuple[np.ndarray, np.ndarray]]
"""Cells that are kept, and of merged tokens' anchors, of each picture."""


def main() -> None:
    model, processor = tp.load("embedded")
    asked = [samples()[number] for number in PICTURES]
    drawn: dict[str, Kept] = {}
    refused: dict[str, str] = {}
    for name in list_recipes():
        if name == "none":
            continue
        try:
            drawn[name] = [kept(model, processor, name, sample) for sample in asked]
        except TokenPruneError as error:
            refused[name] = str(error).splitlines()[0]
        print(name, "-" if name in refused else "", file=sys.stderr)
    names = list(drawn)
    sheets = [names[first : first + PER_SHEET] for first in range(0, len(names), PER_SHEET)]
    for old in (ROOT / "docs" / "images").glob("gallery-*.png"):
        old.unlink()
    for number, sheet in enumerate(sheets, start=1):
        save(picture(sheet, drawn, asked), ROOT / "docs" / "images" / f"gallery-{number}.png")
    PAGE.write_text(page(sheets, refused, asked), encoding="utf-8")


def kept(model: object, processor: object, name: str, sample: object) -> tuple[np.ndarray, np.ndarray]:
    budget = {} if name == "vtw" else {"keep": SHARE}
    report = tp.ask(model, processor, sample.path, sample.question, name, **budget).report
    stage = [one for one in report.stages if (one.kept[0] >= 0).any()][-1:]
    (frame,) = frames_of(report.grids[0], 1)
    rows = [[int(i) for i in row if i >= 0] for one in stage for row in (one.kept[0], one.merged[0])]
    left, merged = rows or [list(range(report.total[0])), []]
    return frame.mask(left), frame.mask(merged)


def picture(names: list[str], drawn: dict[str, Kept], asked: list) -> Figure:
    lines = -(-len(names) // PER_LINE)
    across = PER_LINE * len(asked)
    figure = Figure(figsize=(across * PANEL, lines * (PANEL + 0.3)), dpi=130, facecolor="white")
    axes = figure.subplots(lines, across, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.25 / (lines * (PANEL + 0.3)), wspace=0.06)
    for each in axes.flat:
        each.set_axis_off()
    pictures = [np.asarray(Image.open(s.path).convert("RGB"), dtype=np.float32) / np.float32(255) for s in asked]
    for number, name in enumerate(names):
        line, place = divmod(number, PER_LINE)
        for column, (shown, (left, merged)) in enumerate(zip(pictures, drawn[name], strict=True)):
            panel = axes[line, place * len(asked) + column]
            (frame,) = frames_of(((1, *left.shape),), 1)
            draw(panel, shown, frame, kept=left, merged=merged)
            if not column:
                panel.set_title(name, fontsize=8, color=INK, loc="left", pad=3)
            counted = f"{int(left.sum())}" + (f" + {int(merged.sum())}" if merged.any() else "")
            panel.set_title(counted, fontsize=6, color=SOFT_INK, loc="right", pad=3)
    return figure


def page(sheets: list[list[str]], refused: dict[str, str], asked: list) -> str:
    titles = [
        f"![What {', '.join(sheet)} keep of three pictures](images/gallery-{number}.png)"
        for number, sheet in enumerate(sheets, start=1)
    ]
    whole = [f"- `{name}`: {why}" for name, why in refused.items()]
    notes = ["", "Not drawn:", "", *whole] if whole else []
    questions = "; ".join(f"*{sample.question}*" for sample in asked)
    return PAGE_TEXT.format(questions=questions, sheets="\n\n".join(titles), notes="\n".join(notes))


PAGE_TEXT = """# Gallery

What every recipe keeps of the same three pictures: the embedded model, `keep: 0.25`, the vision tokens behind the last
stage that keeps any. The numbers count them, and what was merged beside them; a dot is the anchor of a merged token.
Drawn by `python scripts/gallery.py` from runs.

The questions: {questions}.

{sheets}

`vtw` takes no budget and is drawn as it is. Methods for video see one frame here. What a
picture shows is a choice, not whether the answer is right: for that, [Methods](methods.md).
{notes}
"""


if __name__ == "__main__":
    main()
