"""Methods that choose by the tower's attention, held against plain Python of their formulas."""

from __future__ import annotations

import plain_greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.test_tower_methods import drawn_count, first_stage, grids, seeds

examples = settings(max_examples=30)


@examples
@given(grids, seeds, st.data())
def test_scope(grid: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("scope", grid, seed, count)
    alike = plain_greedy.cosines(seen["hidden"], seen["hidden"])
    kept = plain_greedy.facility_location(alike, count, candidate=list(seen["class_attention"]))
    assert result.kept[0].tolist() == sorted(kept)
