"""The matrix that every family runs: recipes x attention x batch x cache x mode, each against the masked reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

from double import Double, doubled
from families import MODELS, Row, build, inputs, ragged_rows, sizes
from kinds import KINDS

from tokenprune.testing.checks import CACHES, MODES, Subject, equals_reference


class Cell(NamedTuple):
    """One way to run a pruned model."""

    recipe: str = "deep"
    attention: str = "sdpa"
    batch: str = "single"
    cache: str = "dynamic"
    mode: str = "greedy"

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def abilities(self) -> tuple[str, ...]:
        """What a family must be able to do to run it (`abilities.py`), beside what all of them can."""
        scored = "rater attention" if self.recipe in ("attention", "adaptive") else None
        named = (scored, *(name for name in self if name in ABILITIES))
        return tuple(name for name in named if name)


FACTORS: Mapping[str, Sequence[str]] = {
    "recipe": tuple(KINDS),
    "attention": ("sdpa", "eager"),
    "batch": ("single", "ragged"),
    "cache": tuple(CACHES),
    "mode": tuple(MODES),
}

ALL = tuple(Cell(*values) for values in product(*FACTORS.values()))
"""The full matrix: 180 cells."""

EXACT = 1e-10
"""Of logits in float64."""

ABILITIES: dict[str, Cell] = {
    "rater attention": Cell(recipe="attention"),
    "sdpa": Cell(),
    "eager": Cell(attention="eager"),
    "ragged": Cell(batch="ragged"),
    "static": Cell(cache="static"),
    "none": Cell(cache="none"),
    "beams": Cell(mode="beams"),
    "sampling": Cell(mode="sampling"),
}
"""Values of the factors that a family may refuse, each with the cell that differs from the plainest by it alone."""


def pairwise(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Some of `cells` in which every two values of different factors meet as they do somewhere in `cells`."""
    missing = {pair for cell in cells for pair in pairs(cell)}
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: len(missing & pairs(cell)))  # the first of equals
        chosen.append(best)
        missing -= pairs(best)
    return tuple(chosen)


def pairs(cell: Cell) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    """Every two values of a cell, by number of their factors."""
    return set(combinations(enumerate(cell), 2))


@cache
def model_of(family: str, attention: str) -> Any:
    """Built once: attaching and detaching leaves no trace, as test_attach.py shows."""
    model: Any = build(family, attention=attention)  # type: ignore[arg-type]
    if MODELS[family].rounds:
        model = model.double()
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model


def run(cell: Cell, family: str) -> None:
    """Raise `AssertionError` unless the cell gives what the masked reference gives.

    Raises:
        UnsupportedModelError: the family refuses it.
    """
    model = model_of(family, cell.attention)
    expand, _ = MODES[cell.mode]
    rows = [Row(images=sizes(family)[:1])] if cell.batch == "single" else ragged_rows(family)
    if expand > 1 and not MODELS[family].expands:
        rows = [replace(row, images=row.images and row.images[:1]) for row in rows]
    batch = inputs(family, model, rows=rows)
    if MODELS[family].rounds:
        with Double():
            run_on(cell, Subject(model, doubled(batch), tolerance=EXACT))
    else:
        run_on(cell, Subject(model, batch))


def run_on(cell: Cell, subject: Subject) -> None:
    """The same for a model and a batch at hand."""
    expand, options = MODES[cell.mode]
    equals_reference(subject, KINDS[cell.recipe], expand=expand, **CACHES[cell.cache], **options)
