"""Samplers: exactly so many, without duplicates, in order; and where each puts them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.samplers.by_score import TopKSampler, UnionSampler
from tokenprune.parts.samplers.even import RandomSampler, UniformSampler
from tokenprune.parts.spread import PHASES, spread

SAMPLERS = [
    TopKSampler(),
    RandomSampler(),
    UniformSampler(),
    *(UniformSampler(phase=phase) for phase in (1, 2, 3)),
    UniformSampler(stride=2),
    UniformSampler(stride=3, offset=1),
    UnionSampler(),
    UnionSampler(stride=2, offset=1),
]
each = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


def scores_of(tokens):
    return torch.where(tokens.valid, tokens.hidden[..., 0].float(), -torch.inf)


def square(side, batch=1):
    return Tokens.from_hidden(torch.zeros(batch, side * side, 1), grid=(side, side))


@each
@settings(max_examples=40)
@given(strategies.batches(), st.data())
def test_exactly_count_distinct_ascending_valid_tokens(sampler, batch, data):
    tokens = strategies.collate(batch, extra=1)
    counts = data.draw(strategies.counts_for(batch))
    kept = sampler(tokens, scores_of(tokens), counts)
    assert kept.shape == (len(batch), max(counts))
    for row, count, sample in zip(kept.tolist(), counts, batch, strict=True):
        assert row[:count] == sorted(set(row[:count]))
        assert all(0 <= i < len(sample.alive) for i in row[:count])
        assert set(row[count:]) <= {-1}


@each
def test_all_is_all_and_too_many_is_an_error(sampler):
    tokens = square(4, 2)
    assert sampler(tokens, scores_of(tokens), 16).tolist() == [list(range(16))] * 2
    assert sampler(tokens, scores_of(tokens), 0).shape == (2, 0)
    with pytest.raises(InputError, match="sample 0: cannot keep 17 of 16"):
        sampler(tokens, scores_of(tokens), 17)
    with pytest.raises(InputError, match="1 counts for a batch of 2"):
        sampler(tokens, scores_of(tokens), (3,))


@settings(max_examples=50)
@given(strategies.samples(), st.data())
def test_top_k_keeps_the_best(sample, data):
    """Plain Python's choice; nested in larger choices; unchanged by an increasing function of the scores."""
    tokens = strategies.collate([sample])
    count = data.draw(st.integers(0, len(sample.alive)))
    scores = scores_of(tokens)
    kept = TopKSampler()(tokens, scores, count)[0].tolist()
    assert kept == plain.best(sample.hidden[:, 0].tolist(), count)
    if count < len(sample.alive):
        assert set(kept) < set(TopKSampler()(tokens, scores, count + 1)[0].tolist())
    assert TopKSampler()(tokens, scores * 2 + 1, count)[0].tolist() == kept


@settings(max_examples=25)
@given(st.permutations(range(25)), st.integers(0, 25))
def test_top_k_follows_a_permutation(order, count):
    scores = torch.randn(1, 25, generator=torch.Generator().manual_seed(0))
    tokens = square(5)
    kept = TopKSampler()(tokens, scores, count)[0].tolist()
    moved = TopKSampler()(tokens, scores[:, list(order)], count)[0].tolist()
    assert sorted(order[i] for i in moved) == kept


def test_random_is_the_seeds_choice():
    tokens = square(12)
    a, b = (RandomSampler(seed=seed)(tokens, scores_of(tokens), 60)[0].tolist() for seed in (0, 1))
    assert a != b
    assert 35 < sum(i < 72 for i in a) + sum(i < 72 for i in b) < 85  # both halves of the image
    assert set(RandomSampler()(tokens, scores_of(tokens), 30)[0].tolist()) < set(a)


@pytest.mark.parametrize(("side", "stride", "points"), [(27, 3, 81), (24, 3, 64), (24, 2, 144), (16, 3, 36), (5, 9, 1)])
def test_strided_uniform_is_the_lattice(side, stride, points):
    """Every cell is within stride - 1 of a kept one; stride 1 is all, a stride beyond the side is one corner."""
    tokens = square(side)
    kept = UniformSampler(stride=stride)(tokens, scores_of(tokens), points)[0].tolist()
    assert kept == [r * side + c for r in range(0, side, stride) for c in range(0, side, stride)]
    cells = torch.tensor([divmod(i, side) for i in kept])
    every = torch.tensor([divmod(i, side) for i in range(side * side)])
    far = (every[:, None] - cells).abs().amax(-1).amin(1)
    assert far.max() <= stride - 1 if stride <= side else far.max() == side - 1
    fewer = UniformSampler(stride=stride)(tokens, scores_of(tokens), points // 2)[0].tolist()
    assert set(fewer) <= set(kept)
    more = UniformSampler(stride=stride)(tokens, scores_of(tokens), points + 10)[0].tolist()
    assert set(kept) < set(more)


@settings(max_examples=200)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_even_layout_covers_the_grid(height, width, data):
    """No empty square is larger than twice the spacing that so many tokens can have."""
    count = data.draw(st.integers(1, height * width))
    cells = [divmod(i, width) for i in spread([(1, height, width)], count)]
    assert len(set(cells)) == count
    rows = sorted({r for r, _ in cells})
    spacing = max(height / len(rows), 1)
    assert rows[0] <= spacing / 2
    assert height - 1 - rows[-1] <= spacing / 2
    per_row = [sum(r == row for r, _ in cells) for row in rows]
    assert max(per_row) - min(per_row) <= 1
    for row in rows:
        columns = [c for r, c in cells if r == row]
        gaps = [b - a for a, b in pairwise(columns)]
        assert all(width // len(columns) <= gap <= -(-width // len(columns)) for gap in gaps)
        assert columns[0] <= width / len(columns) / 2
        assert width - 1 - columns[-1] <= width / len(columns) / 2


def test_even_layout_by_hand():
    assert spread([(1, 4, 4)], 4) == [5, 7, 13, 15]
    assert spread([(1, 6, 6)], 9) == [r * 6 + c for r in (1, 3, 5) for c in (1, 3, 5)]
    assert spread([(1, 1, 9)], 3) == [1, 4, 7]
    assert spread([(1, 9, 1)], 3) == [1, 4, 7]
    assert spread([(1, 3, 3)], 0) == []
    assert spread([], 0) == []


def middle(height, width, count):
    """The layout without a phase, written out: every token in the middle of its share of rows and columns."""
    fewest = -(-count // width)
    rows = max(fewest, min(height, count, round((count * height / width) ** 0.5)))
    found = []
    for i in range(rows):
        columns = round_half_up((i + 1) * count, rows) - round_half_up(i * count, rows)
        row = (2 * i + 1) * height // (2 * rows)
        found += [row * width + (2 * j + 1) * width // (2 * columns) for j in range(columns)]
    return found


def round_half_up(above, below):
    return (2 * above + below) // (2 * below)


@settings(max_examples=200)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_phases_shift_the_even_layout_within_its_spacing(height, width, data):
    """Phase 0 is the layout in the middle; others keep its rows' counts and move no token by a whole spacing."""
    count = data.draw(st.integers(1, height * width))
    still = spread([(1, height, width)], count)
    assert still == middle(height, width, count)
    rows = len({i // width for i in still})
    for phase in range(len(PHASES)):
        moved = spread([(1, height, width)], count, phase=phase)
        assert moved == sorted(set(moved)) and len(moved) == count and moved[0] >= 0 and moved[-1] < height * width
        assert moved == spread([(1, height, width)], count, phase=phase)
        for one, other in zip(still, moved, strict=True):  # both in raster order, so the n-th answers the n-th
            assert abs(one // width - other // width) <= -(-height // (2 * rows))


@pytest.mark.parametrize(("side", "count"), [(4, 4), (12, 36), (24, 144)])
def test_phases_of_every_second_row_and_column_are_its_four_places(side, count):
    seen = [i for phase in range(4) for i in spread([(1, side, side)], count, phase=phase)]
    assert sorted(seen) == list(range(side * side))


def test_phases_take_every_place_of_a_row_equally_often():
    """A quarter of a row, three quarters missing: each phase has another place."""
    assert [spread([(1, 1, 8)], 2, phase=phase) for phase in range(4)] == [[2, 6], [0, 4], [3, 7], [1, 5]]
    assert sorted(i for phase in range(4) for i in spread([(1, 8, 1)], 2, phase=phase)) == list(range(8))


def test_phase_is_for_layouts_without_a_stride():
    with pytest.raises(InputError, match="phase 1 is for layouts without a stride; give an offset instead"):
        UniformSampler(stride=2, phase=1)
    with pytest.raises(InputError, match="phase=4"):
        UniformSampler(phase=4)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.data(),
)
def test_images_and_frames_get_their_share(grids, phase, data):
    sizes = [t * h * w for t, h, w in grids]
    count = data.draw(st.integers(0, sum(sizes)))
    index = spread(grids, count, phase=phase)
    assert index == sorted(set(index))
    assert len(index) == count
    start = 0
    for (frames, height, width), size in zip(grids, sizes, strict=True):
        inside = [i - start for i in index if start <= i < start + size]
        assert abs(len(inside) - count * size / sum(sizes)) < 1
        per_frame = [sum(i // (height * width) == f for i in inside) for f in range(frames)]
        assert max(per_frame) - min(per_frame) <= 1
        start += size
    assert all(0 <= i < start for i in index)


def test_what_is_left_is_sampled_evenly_in_raster_order():
    left = [0, 1, 2, 3, 10, 11, 12, 13, 14]
    tokens = strategies.collate([strategies.sample((1, 4, 4), alive=left), strategies.sample((1, 3, 3))])
    kept = UniformSampler()(tokens, scores_of(tokens), (3, 9))
    assert kept.tolist() == [[1, 4, 7, *[-1] * 6], list(range(9))]


def test_tokens_that_are_no_grid_are_sampled_evenly_in_raster_order():
    """Line breaks between rows: ten tokens, nine of them in the grid; and nine that are left of the ten."""
    tokens = dataclasses.replace(Tokens.from_hidden(torch.zeros(1, 10, 1)), grids=(((1, 3, 3),),))
    assert UniformSampler()(tokens, scores_of(tokens), 10).tolist() == [list(range(10))]
    fewer = tokens.take(torch.arange(9)[None], (9,))
    assert UniformSampler()(fewer, scores_of(fewer), 4).tolist() == [[1, 3, 5, 7]]


def test_union_takes_the_lattice_first_then_the_best():
    tokens = square(4)
    scores = torch.arange(16.0)[None]
    take = lambda count: UnionSampler(stride=2)(tokens, scores, count)[0].tolist()  # noqa: E731
    assert take(2) == [8, 10]  # fewer than the lattice: its best points
    assert take(4) == [0, 2, 8, 10]
    assert take(6) == [0, 2, 8, 10, 14, 15]
