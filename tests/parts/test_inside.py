"""Parts of methods that act inside the vision tower, held against plain code of their formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plain_inside as plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.recyclers.nearest import NearestRecycler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.features import AlternateScorer, DensityPeaksScorer
from tokenprune.stage import Stage

examples = settings(max_examples=30)


@st.composite
def pictures(draw: st.DrawFn) -> Tokens:
    """One sample of one or two pictures or frames, without ties; some tokens may be gone."""
    side = st.integers(1, 4)
    grids = draw(st.lists(st.tuples(st.integers(1, 2), side, side), min_size=1, max_size=2))
    total = sum(t * h * w for t, h, w in grids)
    alive = sorted(draw(st.sets(st.integers(0, total - 1), min_size=1)))
    return strategies.collate([strategies.sample(*grids, seed=draw(st.integers(0, 10_000)), alive=alive)])


def array(x: torch.Tensor) -> np.ndarray:
    return x[0].double().numpy()


@examples
@given(pictures(), st.integers(1, 5), st.integers(1, 12))
def test_density_peaks_of_surroundings(tokens: Tokens, neighbours: int, window: int) -> None:
    got = DensityPeaksScorer(features="hidden", neighbours=neighbours, window=window)(tokens)
    cells = [tuple(cell) for cell in tokens.cell[0].tolist()]
    assert np.allclose(array(got), plain.ailurus_scores(array(tokens.hidden), cells, neighbours, window), atol=1e-4)


@examples
@given(pictures(), st.integers(1, 12), st.data())
def test_representatives_of_surroundings_take_in_what_is_dropped(
    tokens: Tokens, window: int, data: st.DataObject
) -> None:
    n = tokens.sizes[0]
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    left = NearestRecycler(window=window).recycle(tokens, torch.tensor([kept]), tokens.mass, len(kept))
    cells = [tuple(cell) for cell in tokens.cell[0].tolist()]
    expected = plain.ailurus_merge(array(tokens.hidden), cells, kept, window)
    assert np.allclose(array(left.hidden), [expected[k] for k in kept], atol=1e-5)
    assert left.mass.sum() == n


@examples
@given(pictures(), st.data())
def test_tokens_at_even_places_are_merged_into_their_partners(tokens: Tokens, data: st.DataObject) -> None:
    """Of the whole stage: who goes, where to, and what the rows and masses become."""
    n = tokens.sizes[0]
    r = data.draw(st.integers(0, n // 2))
    mass = torch.randint(1, 5, (1, n), generator=torch.Generator().manual_seed(n)).float()
    tokens = replace(tokens, mass=mass)
    recycler = NearestRecycler(average="mass", within="odd")
    stage = Stage(place=1, scorer=AlternateScorer(), scheduler=FixedScheduler(keep=n - r), recycler=recycler)
    left = stage(tokens).tokens
    expected = plain.tome(array(tokens.hidden), mass[0].tolist(), r)
    assert left.origin[0].tolist() == tokens.origin[0, sorted(expected)].tolist()
    assert np.allclose(array(left.hidden), [expected[i][0] for i in sorted(expected)], atol=1e-5)
    assert left.mass[0].tolist() == [expected[i][1] for i in sorted(expected)]


def test_equal_tokens_of_two_pictures_are_not_near() -> None:
    """Distance 0 times infinitely far is not a number, which must not be asked."""
    tokens = strategies.collate([strategies.sample((1, 2, 2), (1, 2, 2))])
    tokens.hidden[:] = 1.0
    scores = DensityPeaksScorer(features="hidden", window=4)(tokens)
    assert not scores.isnan().any()
    left = NearestRecycler(window=4).recycle(tokens, torch.tensor([[0, 4]]), tokens.mass, 2)
    assert left.mass.tolist() == [[4.0, 4.0]]


def test_a_window_goes_with_all_of_a_sample() -> None:
    with pytest.raises(InputError, match="a window of 3 goes with within: sample, not frame"):
        NearestRecycler(within="frame", window=3)
