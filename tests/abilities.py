"""What a family can do, one check for each ability; `support.json` holds what they found, docs/models.md shows it.

A check raises `UnsupportedModelError` where the family refuses by name, `AssertionError` where it is not exact, and
nothing where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matrix
import torch
from double import Double, doubled
from families import Row, inputs, ragged_rows, row_inputs, vision_mask
from hidden_patches import differences, exact
from kinds import fixed, recipe, stage
from pruned import TOLERANCE, logits_of, worst
from reference import generate_logits, masked_reference
from renumbered import numbered_through

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.noise import noise, usual_pictures
from tokenprune.families.shape import model_shape
from tokenprune.study.counters import torch_counts
from tokenprune.testing import checks
from tokenprune.testing.checks import STEPS, Subject

FOUND = Path(__file__).parent / "support.json"
"""For each family what it refuses, and with which words: ``python scripts/support.py`` writes it."""


def subject(family: str, rows: Sequence[Row] | None = None) -> Subject:
    """A tiny model of the family, and a batch for it."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model, rows=rows)
    return Subject(model, batch, [row_inputs(batch, row) for row in range(len(batch.images))])


def attention_rows(family: str) -> None:
    """What raters read is what eager attention gives, before and behind places in layers of any type."""
    checks.rater_attention(subject(family), matrix.model_of(family, "eager"))


def everything_kept(family: str) -> None:
    """``keep: 1.0`` is bit-identical, and detaching leaves no trace."""
    checks.everything_kept(subject(family))
    checks.no_trace(subject(family))


def row_alone(family: str) -> None:
    """A row of a batch keeps the tokens, and gives the logits, of the sample alone."""
    checks.row_alone(subject(family, [*ragged_rows(family), Row(before=1, after=4)]))


def second_turn(family: str) -> None:
    """A second turn of text on the same cache equals the masked reference's."""
    checks.second_turn(subject(family))


def prompt_lookup(family: str) -> None:
    """Prompt-lookup decoding, which reads candidates with the prompt and crops the cache, gives the greedy answer."""
    checks.prompt_lookup(subject(family, [Row(after=12)]))


TWICE = recipe(
    "twice",
    stage(2, fixed(0.6), scorer="random", positions="renumber"),
    stage(5, fixed(0.3), scorer="norm", positions="renumber"),
)


def renumbered(family: str) -> None:
    """``positions: renumber`` equals the renumbered reference, and is seen."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    with tp.attach(model, TWICE) as attached:
        got, logits = generate_logits(model, batch, max_new_tokens=STEPS)
    stages = [(told.layer, told.kept) for told in attached.report.stages]
    with masked_reference(model, vision, stages):
        original = generate_logits(model, batch, max_new_tokens=STEPS)[1]
        with numbered_through(model, vision, batch["attention_mask"], stages):
            expected, expected_logits = generate_logits(model, batch, max_new_tokens=STEPS)
    assert torch.equal(got, expected)
    assert worst(logits, expected_logits) < TOLERANCE < worst(original, logits) / 10


def ledger(family: str) -> None:
    """The closed form is what PyTorch counts, untouched and with a recipe, to the last multiply-add."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model, rows=[Row(after=9)])
    total = int(vision_mask(model, batch["input_ids"]).sum())
    model_shape(model)  # refuses first, where it does
    with tp.attach(model, "fastv", keep=0.4) as attached:
        reduced = torch_counts(model, batch)[""]
        grids = attached.report.grids[0]
    told = tp.ledger(model, "fastv", keep=0.4, tokens=total, grids=grids, text=batch["input_ids"].shape[1] - total)
    assert (told.untouched.prefill, told.reduced.prefill) == (torch_counts(model, batch)[""], reduced)


def bench(family: str) -> None:
    """Pictures of noise, of the usual size, run through the model."""
    model = matrix.model_of(family, "sdpa")
    pictures = usual_pictures(model.config)
    with tp.attach(model, "uniform", keep=0.5) as attached:
        logits_of(model, noise(model, pictures, text=9, batch=2))
    assert attached.report.total == (pictures.tokens,) * 2


def inside_the_tower(family: str) -> None:
    """Stages inside the vision tower equal the masked reference of tower and decoder, in float64."""
    model, eager = (exact(family, attention) for attention in ("sdpa", "eager"))
    with torch.no_grad(), Double():
        difference, without = differences(model, eager, doubled(inputs(family, model)))
    assert difference < 1e-12 < without / 1e9


CHECKS: dict[str, Callable[[str], None]] = {
    **{name: partial(matrix.run, cell) for name, cell in matrix.ABILITIES.items()},
    "keep 1.0": everything_kept,
    "row alone": row_alone,
    "second turn": second_turn,
    "prompt lookup": prompt_lookup,
    "renumber": renumbered,
    "in the tower": inside_the_tower,
    "ledger": ledger,
    "bench": bench,
}
"""Ability to check, in the order of the table's columns."""


def refusal(family: str, ability: str) -> str | None:
    """What the family says when it refuses this; None where it is exact."""
    try:
        CHECKS[ability](family)
    except UnsupportedModelError as error:
        return str(error)
    return None


def refused(family: str) -> dict[str, str]:
    """What was found: abilities that the family refuses, with its words."""
    return json.loads(FOUND.read_text(encoding="utf-8")).get(family, {}) if FOUND.is_file() else {}
