"""Every family, and the whole matrix: exact, or refused by name as `support.json` says."""

from __future__ import annotations

import json

import pytest
from abilities import CHECKS, FOUND, attention_rows, refusal, refused
from family_models import MODELS
from matrix import ABILITIES, ALL, Cell, pairs, pairwise, run

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.catalogue import adapters

CHOSEN = pairwise(ALL)


def check(family: str, cell: Cell) -> None:
    told = [words for ability, words in refused(family).items() if ability in cell.abilities]
    if not told:
        run(cell, family)
        return
    with pytest.raises(UnsupportedModelError) as caught:
        run(cell, family)
    assert str(caught.value) in told


@pytest.mark.parametrize("cell", CHOSEN, ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_pairs_equal_the_masked_reference(family: str, cell: Cell) -> None:
    check(family, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in ALL if cell not in CHOSEN], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_all_equal_the_masked_reference(family: str, cell: Cell) -> None:
    check(family, cell)


@pytest.mark.parametrize("ability", [name for name in CHECKS if name not in ABILITIES])
@pytest.mark.parametrize("family", MODELS)
def test_a_family_can_do_what_was_found(family: str, ability: str) -> None:
    assert refusal(family, ability) == refused(family).get(ability)


@pytest.mark.parametrize("family", MODELS)
def test_attention_that_raters_read_is_that_of_the_eager_kernel(family: str) -> None:
    attention_rows(family)


def test_every_two_values_meet() -> None:
    assert {pair for cell in CHOSEN for pair in pairs(cell)} == {pair for cell in ALL for pair in pairs(cell)}
    assert len(CHOSEN) < len(ALL) / 9


def test_what_a_cell_needs() -> None:
    assert Cell().abilities == ("sdpa",)
    assert Cell("adaptive", "eager", "ragged", "static", "beams").abilities == (
        "rater attention",
        "eager",
        "ragged",
        "static",
        "beams",
    )


def test_each_family_has_a_tiny_model_and_was_tried() -> None:
    built = {tiny.config()[1].model_type for tiny in MODELS.values()}
    assert built == set(adapters())
    assert set(json.loads(FOUND.read_text(encoding="utf-8"))) == set(MODELS)
