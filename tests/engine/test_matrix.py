"""Every family, and the whole matrix: exact, or refused by name as `support.json` says."""

from __future__ import annotations

import json
import re

import pytest
from abilities import CHECKS, FOUND, attention_rows, refusal, refused
from family_models import MODELS
from matrix import ABILITIES, ALL, Cell, pairs, pairwise, run
from transformers import CONFIG_MAPPING

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.catalogue import REFUSED, adapter_of, adapters

CHOSEN = pairwise(ALL)
"""Cells in which every two values meet: a fifth of them for each family is what CI has time for."""


def check(family: str, cell: Cell) -> None:
    told = [words for ability, words in refused(family).items() if ability in cell.abilities]
    if not told:
        run(cell, family)
        return
    with pytest.raises(UnsupportedModelError) as caught:
        run(cell, family)
    assert same_words(str(caught.value)) in map(same_words, told)


def same_words(refusal: str) -> str:
    """A refusal without its numbers, which name the layer."""
    return re.sub(r"\d+", "#", refusal)


@pytest.mark.in_turn(5)
@pytest.mark.parametrize("cell", CHOSEN, ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_cells_in_turn_equal_the_masked_reference(family: str, cell: Cell) -> None:
    check(family, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in ALL if cell not in CHOSEN], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_all_others_equal_the_masked_reference(family: str, cell: Cell) -> None:
    check(family, cell)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("ability", [name for name in CHECKS if name not in ABILITIES])
@pytest.mark.parametrize("family", MODELS)
def test_a_family_can_do_what_was_found(family: str, ability: str) -> None:
    assert refusal(family, ability) == refused(family).get(ability)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("family", MODELS)
def test_attention_that_raters_read_is_that_of_the_eager_kernel(family: str) -> None:
    told = refused(family).get("rater attention", "")
    if "recurrent" in told or not told:  # of a recurrent layer it cannot be read, of the others it can
        attention_rows(family)
        return
    with pytest.raises(UnsupportedModelError, match=re.escape(told)):
        attention_rows(family)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_supported_are_refused_with_the_reason(family: str) -> None:
    """By their configuration alone, before any weights are read."""
    assert family not in adapters()
    config = CONFIG_MAPPING[family]()
    with pytest.raises(UnsupportedModelError, match=re.escape(f"attach: {family} is not supported: {REFUSED[family]}")):
        adapter_of(config, asker="attach")


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
