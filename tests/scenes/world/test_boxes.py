"""Boxes as answers: bins, and IoU against counting cells one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.scenes.world.boxes import BINS, bin_of, box_answer, same_box
from tokenprune.scenes.world.questions import is_right

EDGE = st.integers(0, BINS - 1)
BOXES = st.tuples(EDGE, EDGE, EDGE, EDGE).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2] + 1) for y in range(box[1], box[3] + 1)}


def text(box: tuple[int, int, int, int]) -> str:
    return " ".join(map(str, box))


@given(BOXES, BOXES)
def test_same_box_counts_cells(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> None:
    shared, either = cells(first) & cells(second), cells(first) | cells(second)
    assert same_box(text(first), text(second)) == (2 * len(shared) >= len(either))


@pytest.mark.parametrize("given", ["", "1 2 3", "1 2 3 4 5", "4 1 2 3", "1 4 3 2", "one 2 3 4", "-1 2 3 4", "² 2 3 4"])
def test_what_is_no_box_is_never_right(given: str) -> None:
    assert not same_box(given, "1 2 3 4")


def test_bins_cover_the_picture() -> None:
    assert [bin_of(place) for place in (-3.0, 0.0, 5.0, 5.1, 95.9, 96.0)] == [0, 0, 0, 1, 18, 18]
    assert box_answer((0.0, 10.0, 50.0, 96.0)) == "0 1 9 18"


def test_only_boxes_need_not_be_word_for_word() -> None:
    assert is_right("box", "1 1 5 5", "1 1 5 4") and not is_right("localisation", "1 1 5 5", "1 1 5 4")
    assert is_right("colour", " Red ", "red") and not is_right("colour", "red red", "red")
