"""Mergers against plain loops: who joins whom, and what the rows become."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plain_greedy as plain
import pytest
import torch
from applied import recycled
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.recyclers.bipartite import BipartiteRecycler
from tokenprune.parts.recyclers.nearest import NearestRecycler
from tokenprune.parts.recyclers.pool import PoolRecycler
from tokenprune.parts.recyclers.transport import TransportRecycler
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


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 20), st.integers(0, 4), st.data())
def test_k_means_starts_at_the_survivors(seed, n, rounds, data):
    count = data.draw(st.integers(1, n - 1))
    tokens, kept = drawn(seed, 1, n, count)
    got, _ = recycled(NearestRecycler(rounds=rounds), tokens, kept, torch.zeros(2, n), count)
    for row in range(2):
        x = tokens.hidden[row].double().numpy()
        members = plain.k_means(x, kept[row].tolist(), rounds)
        assert got.origin[row].tolist() == list(members)
        assert got.mass[row].tolist() == [len(own) for own in members.values()]
        assert np.allclose(got.hidden[row].numpy(), [x[own].mean(0) for own in members.values()], atol=1e-5)


def test_rounds_and_places_do_not_go_together():
    with pytest.raises(InputError, match="2 rounds, but what joins by its place does not by likeness"):
        NearestRecycler(within="place", rounds=2)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 20), st.integers(0, 30), st.sampled_from([0.1, 1.0]), st.data())
def test_transport_fills_survivors_alike(seed, n, rounds, temperature, data):
    count = data.draw(st.integers(1, n - 1))
    tokens, kept = drawn(seed, 1, n, count)
    mass = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(seed)).float()
    tokens = replace(tokens, mass=mass)
    recycler = TransportRecycler(temperature=temperature, rounds=rounds)
    got, _ = recycled(recycler, tokens, kept, torch.zeros(2, n), count)
    for row in range(2):
        x, own, m = tokens.hidden[row].double().numpy(), kept[row].tolist(), mass[row].tolist()
        dropped = [i for i in range(n) if i not in own]
        parts = plain.transport(x, own, m, temperature, rounds)
        assert got.origin[row].tolist() == own
        for number, k in enumerate(own):
            taken = [m[i] * parts[place, number] for place, i in enumerate(dropped)]
            total = m[k] + sum(taken)
            state = (m[k] * x[k] + sum(t * x[i] for t, i in zip(taken, dropped, strict=True))) / total
            assert abs(float(got.mass[row, number]) - total) < 1e-3
            assert np.allclose(got.hidden[row, number].numpy(), state, atol=1e-4)
        assert abs(float(got.mass[row].sum()) - sum(m)) < 1e-3


def test_a_survivor_amid_many_alike_does_not_take_them_all():
    """Eight tokens like the first survivor, none like the second: by likeness 8 to 0, by transport 4 to 4."""
    x = torch.zeros(1, 10, 2)
    x[0, :9, 0], x[0, 9, 1] = 1.0, 1.0
    tokens, kept = Tokens.from_hidden(x, grid=(1, 10)), torch.tensor([[0, 9]])
    alike, _ = recycled(NearestRecycler(), tokens, kept, torch.zeros(1, 10), 2)
    spread, _ = recycled(TransportRecycler(), tokens, kept, torch.zeros(1, 10), 2)
    assert alike.mass.tolist() == [[9.0, 1.0]]
    assert (spread.mass - 5).abs().max() < 1e-4
