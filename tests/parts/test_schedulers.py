"""Schedulers: golden counts of the papers, and the limits that hold for all."""

from __future__ import annotations

import dataclasses

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, InputError
from tokenprune.parts.samplers.by_score import UnionSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler, PyramidScheduler, SolvedScheduler, TableScheduler
from tokenprune.parts.schedulers.lattice import LatticeScheduler
from tokenprune.parts.schedulers.rank import RankRatioScheduler

GRID = ((1, 24, 24),)
schedulers = st.one_of(
    st.builds(lambda keep: FixedScheduler(keep=keep), st.one_of(st.integers(1, 60), st.floats(0.01, 1))),
    st.builds(lambda keep: PyramidScheduler(keep=keep), st.floats(0.01, 1)),
    st.builds(
        lambda rows: TableScheduler(rows={n: max(1, n * k // 10) for n, k in rows.items()}),
        st.dictionaries(st.integers(1, 60), st.integers(1, 10), min_size=1, max_size=4),
    ),
    st.builds(
        lambda stride, keep: LatticeScheduler(stride=stride, keep=keep, size="fixed"),
        st.integers(1, 5),
        st.floats(0, 1),
    ),
)


@settings(max_examples=100)
@given(schedulers, strategies.samples())
def test_static_counts_lie_between_one_and_all(scheduler, sample):
    size = len(sample.alive)
    count = scheduler.count(size, total=sample.total, grids=sample.grids)
    assert isinstance(count, int)
    assert min(1, size) <= count <= size
    tokens = strategies.collate([sample, sample])
    assert scheduler(tokens, tokens.hidden) == (count, count)
    assert 0 <= scheduler.nominal(size, total=sample.total, grids=sample.grids) <= size


@pytest.mark.parametrize(
    ("scheduler", "size", "expected"),
    [
        (FixedScheduler(keep=0.3), 729, 218),
        (FixedScheduler(keep=0.25), 729, 182),
        (FixedScheduler(keep=1 - 0.9), 10, 1),  # int(10 * (1 - 0.9)) is 0
        (FixedScheduler(keep=1.0), 576, 576),
        (FixedScheduler(keep=300), 576, 300),
        (FixedScheduler(keep=300), 10, 10),
        (PyramidScheduler(keep=0.5), 576, 288),
        (PyramidScheduler(keep=0.5), 288, 144),
        (PyramidScheduler(keep=0.3**2), 275, 24),  # FEATHER's second stage: κ² of what is left
        (TableScheduler(rows={576: 300}), 576, 300),
        (TableScheduler(rows={576: 300}), 288, 150),
        (TableScheduler(rows={576: 300}), 2880, 1500),
        (TableScheduler(rows={100: 50, 200: 50}), 150, 56),  # the share between 1/2 and 1/4 is 3/8
        (TableScheduler(rows={100: 50, 200: 50}), 100, 50),
        (TableScheduler(rows={100: 50, 200: 50}), 200, 50),
        (TableScheduler(rows={200: 50, 100: 50}), 400, 100),
        (TableScheduler(rows={100: 1}), 5, 1),
    ],
    ids=repr,
)
def test_counts_by_hand(scheduler, size, expected):
    assert scheduler.count(size, total=size, grids=GRID) == expected


def test_fixed_is_of_the_original_tokens_and_pyramid_of_those_that_enter():
    assert FixedScheduler(keep=0.25).count(200, total=576, grids=GRID) == 144
    assert FixedScheduler(keep=0.5).count(200, total=576, grids=GRID) == 200
    assert PyramidScheduler(keep=0.25).count(200, total=576, grids=GRID) == 50


@pytest.mark.parametrize(("side", "stride", "points"), [(27, 3, 81), (24, 3, 64), (24, 2, 144), (16, 3, 36)])
def test_lattice_alone_has_its_golden_size(side, stride, points):
    scheduler = LatticeScheduler(stride=stride)
    assert scheduler.static
    assert scheduler.count(side**2, total=side**2, grids=((1, side, side),)) == points
    assert scheduler.count(2 * side**2, total=2 * side**2, grids=((2, side, side),)) == 2 * points
    tokens = Tokens.from_hidden(torch.zeros(1, side**2, 1))
    assert (tokens.cell[..., 1:] % stride == 0).all(-1).sum() == points


def test_lattice_fixed_is_the_expected_union():
    scheduler = LatticeScheduler(stride=3, keep=0.3, size="fixed")
    assert scheduler.count(729, total=729, grids=((1, 27, 27),)) == 275
    assert scheduler.nominal(729, total=729, grids=((1, 27, 27),)) == 275
    off = LatticeScheduler(stride=3, offset=1, keep=0.0)
    assert off.count(35, total=35, grids=((1, 5, 7),)) == 2 * 2


@settings(max_examples=25)
@given(st.integers(0, 9999))
def test_feathers_union_lies_within_its_bounds_and_is_what_the_sampler_takes(seed):
    """218 by score and 81 on the lattice of 27 x 27: between 218 and 299, and exactly their union."""
    scores = torch.rand(2, 729, generator=torch.Generator().manual_seed(seed))
    tokens = Tokens.from_hidden(torch.zeros(2, 729, 1))
    counts = LatticeScheduler(stride=3, keep=0.3)(tokens, scores)
    assert counts.dtype == torch.int64
    assert all(218 <= n <= 299 for n in counts.tolist())
    kept = UnionSampler(stride=3)(tokens, scores, tuple(counts.tolist()))
    for row, score in zip(kept, scores, strict=True):
        best = set(score.topk(218).indices.tolist())
        grid = {r * 27 + c for r in range(0, 27, 3) for c in range(0, 27, 3)}
        assert row[row >= 0].tolist() == sorted(best | grid)


def test_after_another_stage_the_union_still_takes_a_share_of_the_original_tokens():
    left = [i for i in range(36) if i // 6 % 2]  # rows 1, 3 and 5: none on the lattice
    tokens = strategies.collate([strategies.sample((1, 6, 6), alive=left)])
    assert LatticeScheduler(stride=2, keep=0.25)(tokens, tokens.hidden[..., 0]).tolist() == [9]


def test_union_reaches_both_bounds():
    tokens = Tokens.from_hidden(torch.zeros(1, 729, 1))
    points = (tokens.cell[..., 1:] % 3 == 0).all(-1).float()
    scheduler = LatticeScheduler(stride=3, keep=0.3)
    assert scheduler(tokens, points).tolist() == [218]
    assert scheduler(tokens, -points).tolist() == [299]
    assert not scheduler.static
    with pytest.raises(InputError, match="needs scores"):
        scheduler.count(729, total=729, grids=((1, 27, 27),))


def test_solved_asks_for_a_budget():
    with pytest.raises(BudgetError, match="budget for the whole recipe"):
        SolvedScheduler().count(576, total=576, grids=GRID)
    assert SolvedScheduler(share=0.5).nominal(100, total=576, grids=GRID) == 288


@dataclasses.dataclass
class Rows:
    """An Attention whose rows are given."""

    rows: torch.Tensor

    def scores(self, raters, **asked):
        raise AssertionError

    def matrix(self, raters, **asked):
        self.asked = asked
        return self.rows


def tokens_of_rank(rank, texts=20, size=576):
    generator = torch.Generator().manual_seed(rank)
    rows = torch.rand(1, texts, rank, generator=generator) @ torch.rand(1, rank, size, generator=generator)
    return dataclasses.replace(Tokens.from_hidden(torch.zeros(1, size, 1)), attention=Rows(rows))


@pytest.mark.parametrize(
    ("scheduler", "rank", "expected"),
    [
        (RankRatioScheduler(), 20, 20),  # λ = 1: as many as the rank
        (RankRatioScheduler(scale=0.5), 20, 298),
        (RankRatioScheduler(scale=0.0), 20, 576),
        (RankRatioScheduler(scale=0.7), 16, 184),  # 560 · 0.7 = 392 go, whatever floats make of it
        (RankRatioScheduler(scale=5.0), 3, 1),
        (RankRatioScheduler(scale=1.0, at_least=64), 20, 64),
        (RankRatioScheduler(rule="keep", scale=13.5), 15, 202),  # v1.0, "192 tokens"
        (RankRatioScheduler(rule="keep", scale=9.0, bias=6), 13, 123),  # "128"
        (RankRatioScheduler(rule="keep", scale=0.8), 15, 12),  # "64"
        (RankRatioScheduler(rule="keep", scale=0.1), 3, 1),  # int(0.3) would drop the whole image
        (RankRatioScheduler(rule="keep", scale=100.0), 20, 576),
        (RankRatioScheduler(rule="keep", scale=1.0, energy=1.0), 3, 3),
    ],
    ids=repr,
)
def test_rank_counts_by_hand(scheduler, rank, expected):
    tokens = tokens_of_rank(rank)
    raters = torch.full((1, 20), 0.05)
    assert scheduler.rank(tokens, raters).tolist() == [rank]
    got = scheduler(tokens, tokens.hidden[..., 0], raters)
    assert got.dtype == torch.int64
    assert got.tolist() == [expected]


def test_rank_counts_raters_only_and_asks_for_what_it_was_told():
    tokens = tokens_of_rank(20)
    raters = torch.zeros(1, 20)
    raters[0, [2, 7, 9]] = 1 / 3
    scheduler = RankRatioScheduler(rope=False, normalise="vision", layer="next")
    assert scheduler.rank(tokens, raters).tolist() == [3]
    assert tokens.attention.asked == {"rope": False, "normalise": "vision", "layer": "next"}
    assert scheduler.reads == Needs(attention="next")
    tokens.attention.rows[0, 9] = 5 * tokens.attention.rows[0, 2]  # a rater that repeats another adds no rank
    assert scheduler.rank(tokens, raters).tolist() == [2]
    with pytest.raises(InputError, match="needs raters"):
        scheduler(tokens, tokens.hidden[..., 0])
    with pytest.raises(InputError, match="needs the attention of a language model"):
        scheduler(Tokens.from_hidden(torch.zeros(1, 4, 1)), torch.zeros(1, 4), raters)


@settings(max_examples=100)
@given(
    st.sampled_from(["delete", "keep"]),
    st.floats(0, 20),
    st.integers(-5, 50),
    st.integers(1, 30),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_rank_counts_are_monotone_and_within_limits(rule, scale, bias, at_least, rank, size):
    make = lambda s, b: RankRatioScheduler(rule=rule, scale=s, bias=b, at_least=at_least)  # noqa: E731
    count = lambda s, b, r: make(s, b).keep_of(torch.tensor([min(r, size)]), torch.tensor([size])).item()  # noqa: E731
    here = count(scale, bias, rank)
    assert min(at_least, size) <= here <= size
    assert count(scale, bias, rank + 1) >= here
    if rule == "delete":
        assert count(scale + 0.5, bias, rank) <= here
        assert count(0.0, bias, rank) == size
    else:
        assert count(scale + 0.5, bias, rank) >= here
        assert count(scale, bias + 1, rank) >= here


def test_rank_counts_know_no_float_error():
    count = RankRatioScheduler(scale=0.6).keep_of(torch.tensor([0]), torch.tensor([25]))
    assert count.item() == 10  # in float32, 25 - 0.6 · 25 is a little less, and 9 once cut off


def test_rank_stands_for_its_expected_share_under_a_budget():
    scheduler = RankRatioScheduler(expected=0.25, at_least=10)
    assert scheduler.nominal(576, total=576, grids=GRID) == 144
    assert scheduler.nominal(100, total=576, grids=GRID) == 100
    assert scheduler.nominal(30, total=36, grids=GRID) == 10
