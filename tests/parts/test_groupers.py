"""Groupers: every token in one group, counts shared out exactly, any sampler per group as if the group stood alone."""

from __future__ import annotations

import dataclasses
from itertools import product
from math import prod

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.groups import fold, share_out
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.parts.contract import Contract
from tokenprune.parts.groupers.geometric import (
    ImageGrouper,
    SegmentGrouper,
    TileGrouper,
    WindowGrouper,
)
from tokenprune.parts.groupers.stretch import StretchGrouper
from tokenprune.parts.groupers.video import FrameGrouper
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler, UnionSampler
from tokenprune.parts.samplers.even import RandomSampler, UniformSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.stage import Stage

GROUPERS = [
    ImageGrouper(),
    FrameGrouper(),
    WindowGrouper(height=2, width=3),
    TileGrouper(rows=2, columns=2),
    SegmentGrouper(frames=2),
    StretchGrouper(parts=3),
]
SAMPLERS = [TopKSampler(), RandomSampler(seed=1), UniformSampler(), UniformSampler(stride=2), UnionSampler(stride=2)]


def plain_groups(grouper, grids) -> list[tuple]:
    """The group of each token in raster order, by a loop over cells; a group is named by what its tokens share."""
    named = []
    for image, grid in enumerate(grids):
        for t, h, w in product(*map(range, grid)):
            match grouper:
                case ImageGrouper():
                    named.append((image,))
                case FrameGrouper():
                    named.append((image, t))
                case WindowGrouper(height=high, width=wide):
                    named.append((image, t, h // high, w // wide))
                case TileGrouper(rows=rows, columns=columns):
                    named.append((image, t, h // -(-grid[1] // rows), w // -(-grid[2] // columns)))
                case SegmentGrouper(frames=frames):
                    named.append((image, t // frames))
                case StretchGrouper(parts=parts):
                    place, n = (t * grid[1] + h) * grid[2] + w, prod(grid)
                    ends = [sum(n // parts + (i < n % parts) for i in range(last + 1)) for last in range(parts)]
                    named.append((image, sum(end <= place for end in ends)))
    return named


@pytest.mark.parametrize("grouper", GROUPERS, ids=repr)
@settings(max_examples=25)
@given(strategies.batches())
def test_groups_are_those_of_a_loop_over_cells(grouper, batch) -> None:
    """Also where an earlier stage has dropped tokens."""
    tokens = strategies.collate(batch)
    groups = grouper(tokens)
    Contract("stage").groups(grouper, groups, tokens)
    for row, (size, grids) in enumerate(zip(tokens.sizes, tokens.grids, strict=True)):
        named = plain_groups(grouper, grids)
        here = [named[i] for i in tokens.origin[row, :size].tolist()]
        index = groups.index[row, :size].tolist()
        assert len({*zip(here, index, strict=True)}) == len({*here}) == len({*index})
        assert [index.count(group) for group in range(len(groups.sizes[row]))] == list(groups.sizes[row])
        assert (groups.index[row, size:] == -1).all()


@given(st.lists(st.integers(0, 50), max_size=12), st.data())
def test_counts_are_shared_out_exactly_and_fairly(sizes, data) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    shares = share_out(count, sizes)
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert all(abs(share - count * size / max(1, sum(sizes))) < 1 for share, size in zip(shares, sizes, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("grouper", GROUPERS, ids=repr)
@settings(max_examples=8)
@given(strategies.batches(least=1), st.data())
def test_a_grouped_stage_keeps_what_the_sampler_keeps_of_each_group_alone(grouper, sampler, batch, data) -> None:
    tokens = strategies.collate(batch, garbage=0.0)
    counts = data.draw(strategies.counts_for(batch))
    stage = Stage(
        place=Place("after_vision"),
        scheduler=FixedScheduler(keep=1),
        scorer=NormScorer(),
        grouper=grouper,
        sampler=sampler,
        recycler=DropRecycler(),
    )
    result = stage(tokens, counts)
    assert result.tokens.check().sizes == tuple(counts)
    scores, groups = NormScorer()(tokens), grouper(tokens)
    for row, count in enumerate(counts):
        expected = []
        for group, share in enumerate(share_out(count, groups.sizes[row])):
            at = (groups.index[row] == group).nonzero().flatten()
            alone = dataclasses.replace(
                tokens.take(torch.stack([at] * len(batch)), (len(at),) * len(batch)),
                grids=((groups.grids[row][group],),) * len(batch),
                total=(len(at),) * len(batch),
            )
            if len(at):
                cell = alone.cell - alone.cell.amin(1, keepdim=True)
                alone = dataclasses.replace(alone, cell=cell, valid=torch.ones_like(alone.valid))
                kept = sampler(alone, scores[:, at], (share,) * len(batch))[row]
                expected += tokens.origin[row, at[kept]].tolist()
        if count < tokens.sizes[row] or counts != tokens.sizes:
            assert result.kept[row][result.kept[row] >= 0].tolist() == sorted(expected)


def test_a_window_is_a_picture_of_its_own_to_the_sampler() -> None:
    """Four windows of 4 x 4, one token each: the middle of every window, not four places of one row."""
    tokens = Tokens.from_hidden(torch.zeros(1, 64, 2), grid=(8, 8))
    folded = fold(tokens, WindowGrouper(height=4, width=4)(tokens))
    assert folded.tokens.grids == (((1, 4, 4),),) * 4
    assert [prod(grid[0]) for grid in folded.tokens.grids] == list(folded.tokens.sizes)
    assert folded.tokens.cell.amax((0, 1)).tolist() == [0, 3, 3]
    stage = Stage(
        place=Place("after_vision"),
        scheduler=FixedScheduler(keep=4),
        scorer=NormScorer(),
        grouper=WindowGrouper(height=4, width=4),
        sampler=UniformSampler(),
        recycler=DropRecycler(),
    )
    kept = stage(tokens).kept[0].tolist()
    assert [(i // 8 // 4, i % 8 // 4) for i in kept] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(i // 8 % 4, i % 8 % 4) for i in kept} == {(2, 2)}
