"""Mergers against plain loops: who joins whom, and what the rows become."""

from __future__ import annotations

import numpy as np
import plain_greedy as plain
import pytest
import torch
from applied import recycled
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.tokens import Tokens
from tokenprune.parts.recyclers.bipartite import BipartiteRecycler
from tokenprune.parts.recyclers.pool import PoolRecycler
from tokenprune.parts.samplers.even import UniformSampler


def drawn(seed: int, rows: int, columns: int, count: int) -> tuple[Tokens, torch.Tensor]:
    """Random tokens, two pictures, and `count` survivors of each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = Tokens.from_hidden(torch.randn(2, rows * columns, 5, generator=generator), grid=(rows, columns))
    kept = torch.stack([torch.randperm(rows * columns, generator=generator)[:count].sort().values for _ in range(2)])
    return tokens, kept


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5), st.data())
def test_pooling_averages_what_lies_nearest(seed, rows, columns, data):
    count = data.draw(st.integers(1, rows * columns))
    tokens, kept = drawn(seed, rows, columns, count)
    got, _ = recycled(PoolRecycler(), tokens, kept, torch.zeros(2, rows * columns), count)
    for row in range(2):
        chosen = kept[row].tolist()
        groups: dict[int, list[int]] = {i: [i] for i in chosen}
        for i in range(rows * columns):
            if i not in chosen:
                far = lambda j, i=i: (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2  # noqa: E731
                groups[min(reversed(chosen), key=far)].append(i)
        x = tokens.hidden[row].double().numpy()
        want = np.array([x[group].mean(0) for group in groups.values()])
        assert np.allclose(got.hidden[row].numpy(), want, atol=1e-5)
        assert got.mass[row].tolist() == [len(group) for group in groups.values()]
        assert got.origin[row].tolist() == chosen


def test_a_quarter_is_two_by_two_pooling():
    tokens = Tokens.from_hidden(torch.randn(1, 64, 3), grid=(8, 8))
    scores = torch.zeros(1, 64)
    got, _ = recycled(PoolRecycler(), tokens, UniformSampler()(tokens, scores, 16), scores, 16)
    want = torch.nn.functional.avg_pool2d(tokens.hidden.view(1, 8, 8, 3).permute(0, 3, 1, 2), 2)
    assert (got.mass == 4).all()
    assert torch.allclose(got.hidden, want.flatten(2).mT, atol=1e-6)


@pytest.mark.parametrize("add", [True, False])
@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 20), st.data())
def test_bipartite_matching_adds_each_to_its_best_target(add, seed, n, data):
    count = data.draw(st.integers(1, n - 1))
    tokens, kept = drawn(seed, 1, n, count)
    recycler = BipartiteRecycler(share=0.3, add=add)
    got, anchors = recycled(recycler, tokens, kept, torch.zeros(2, n), count)
    for row in range(2):
        x = tokens.hidden[row].double().numpy()
        dropped = [i for i in range(n) if i not in kept[row].tolist()]
        targets = anchors[row].tolist()
        assert len(targets) == recycler.added(len(dropped)) == max(1, 3 * len(dropped) // 10)
        assert set(targets) <= set(dropped)
        joined: dict[int, list[int]] = {t: [] for t in targets}
        for i in dropped:
            if i not in targets:
                joined[max(targets, key=lambda t, i=i: plain.cosine(x[i], x[t]))].append(i)
        for t, members in joined.items():
            want = x[[t, *members]].mean(0) if not add else x[t] + (x[members].mean(0) if members else 0)
            at = got.origin[row].tolist().index(t)
            assert np.allclose(got.hidden[row, at].numpy(), want, atol=1e-5)
            assert got.mass[row, at] == 1 + len(members)
        assert got.mass[row].sum() == n
