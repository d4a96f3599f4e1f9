"""Where vision tokens lie on pictures: the grid says what it is, and nobody guesses it from sizes."""

from __future__ import annotations

import pickle

import pytest
import torch
from families import Row, build, inputs

import tokenprune as tp
from tokenprune.core.frames import frames_of
from tokenprune.core.grids import Tiles, square_or_row
from tokenprune.cost.presets import PRESETS
from tokenprune.errors import InputError


def test_a_model_of_tiles_says_which_grids_are_tiles() -> None:
    """Through the report, whose frames are then those of two pictures; a grid of tiles still equals its numbers."""
    model = build("llava_next")
    batch = inputs("llava_next", model, rows=[Row(images=((16, 16), (8, 24)))])
    with tp.attach(model, "fastv") as attached, torch.no_grad():
        model(**batch)
    (grids,) = attached.report.grids
    assert [type(grid) for grid in grids] == [tuple, Tiles, tuple, Tiles]
    assert grids[1] == (1, 4, 5) and hash(grids[1]) == hash((1, 4, 5))
    frames = frames_of(pickle.loads(pickle.dumps(grids)), images=2)
    assert [(frame.image, frame.newline) for frame in frames] == [(0, False), (0, True), (1, False), (1, True)]
    assert frames[1].name == "image 1, tiles" and frames[3].width == grids[3][2] - 1


def test_pictures_of_other_sizes_are_no_tiles() -> None:
    """A square picture and a wider one: one picture at hand is one too few, two are two pictures without separators."""
    grids = [(1, 2, 2), (1, 2, 4)]
    with pytest.raises(InputError, match=r"got 1 picture for the grids \[\(1, 2, 2\), \(1, 2, 4\)\]"):
        frames_of(grids, images=1)
    assert [(frame.image, frame.width, frame.newline) for frame in frames_of(grids, 2)] == [
        (0, 2, False),
        (1, 4, False),
    ]


def test_a_tower_without_tiles_takes_pairs_for_pictures() -> None:
    """The family's shape decides: a pair of grids is an overview and its two tiles on LLaVA-NeXT alone."""
    grids = [(1, 24, 24), (1, 24, 49)]
    one = PRESETS["llava-1.5-7b"].vision.tower(576, [(1, 24, 24)])
    assert PRESETS["llava-next-7b"].vision.tower(1752, grids) == 3 * one
    assert PRESETS["llava-1.5-7b"].vision.tower(2 * 576, grids) == 2 * one


@pytest.mark.parametrize(("tokens", "grid"), [(576, (1, 24, 24)), (575, (1, 1, 575)), (1, (1, 1, 1)), (0, (1, 0, 0))])
def test_a_bare_count_is_a_square_or_a_row(tokens: int, grid: tuple[int, int, int]) -> None:
    assert square_or_row(tokens) == grid
