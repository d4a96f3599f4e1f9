"""Methods that choose by the tower's attention, held against plain Python of their formulas."""

from __future__ import annotations

import plain_after_tower as plain
import plain_greedy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.test_tower_methods import drawn_count, first_stage, grids, seeds

from tokenprune.core.tokens import Tokens
from tokenprune.parts.groupers.stretch import StretchGrouper

examples = settings(max_examples=30)


@examples
@given(grids, seeds, st.data())
def test_scope(grid: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("scope", grid, seed, count)
    alike = plain_greedy.cosines(seen["hidden"], seen["hidden"])
    kept = plain_greedy.facility_location(alike, count, candidate=list(seen["class_attention"]))
    assert result.kept[0].tolist() == sorted(kept)


@examples
@given(grids, seeds, st.data())
def test_holov(grid: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("holov", grid, seed, count)
    assert result.kept[0].tolist() == plain.holov(seen["x"], seen["class_attention"], count, 16, 0.09)


def test_a_stretch_of_more_variety_is_due_more() -> None:
    """Which the code's own formula does not do: it scales each stretch's variance to the stretch's own attention."""
    x = torch.ones(1, 8, 4)
    x[0, 4:6] *= -1  # the second stretch looks both ways
    tokens = Tokens.from_hidden(x, grid=(1, 8))
    scores = torch.ones(1, 8)
    plain_share = StretchGrouper(parts=2, by="score")
    varied = StretchGrouper(parts=2, by="score", diversity=1.0)
    assert plain_share.share(plain_share(tokens), (4,), scores) == ((2, 2),)
    assert varied.share(varied(tokens), (4,), scores) == ((1, 3),)
