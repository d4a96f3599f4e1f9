"""`Tokens`: its invariants, and what `take` carries along."""

from __future__ import annotations

import dataclasses

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.signals import Question
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError


@settings(max_examples=50)
@given(strategies.batches(), st.data())
def test_take_carries_every_field_along(batch, data):
    tokens = strategies.collate(batch).check()
    picks = [sorted(data.draw(st.sets(st.sampled_from(range(len(s.alive)))))) if s.alive else [] for s in batch]
    most = max(map(len, picks))
    index = torch.tensor([pick + [-1] * (most - len(pick)) for pick in picks], dtype=torch.int64)
    taken = tokens.take(index, tuple(map(len, picks))).check()
    for i, pick in enumerate(picks):
        for name in ("hidden", "origin", "slot", "cell", "position", "mass"):
            assert torch.equal(getattr(taken, name)[i, : len(pick)], getattr(tokens, name)[i, pick]), name
    assert taken.question is tokens.question
    assert (taken.total, taken.grids, taken.attention) == (tokens.total, tokens.grids, tokens.attention)
    assert (taken.origin[~taken.valid] == -1).all()
    assert (taken.mass[~taken.valid] == 0).all()


def test_take_twice_is_to_take_the_composition():
    tokens = strategies.collate([strategies.sample((1, 4, 4))])
    first, second = torch.tensor([[1, 4, 9, 12, 15]]), torch.tensor([[0, 2, 4]])
    twice = tokens.take(first, (5,)).take(second, (3,))
    assert twice.origin.tolist() == [[1, 9, 15]]
    assert torch.equal(twice.hidden, tokens.take(first[:, second[0]], (3,)).hidden)


def test_three_dimensional_positions_are_taken_on_their_last_axis():
    tokens = Tokens.from_hidden(torch.zeros(2, 9, 4))
    tokens = dataclasses.replace(tokens, position=torch.arange(54).view(3, 2, 9)).check()
    taken = tokens.take(torch.tensor([[0, 8], [3, -1]]), (2, 1)).check()
    assert taken.position[:, 0].tolist() == [[0, 8], [18, 26], [36, 44]]
    assert taken.position[:, 1, 0].tolist() == [12, 30, 48]


def test_from_hidden_finds_the_grid():
    assert Tokens.from_hidden(torch.zeros(1, 9, 4)).grids == (((1, 3, 3),),)
    assert Tokens.from_hidden(torch.zeros(1, 8, 4)).grids == (((1, 1, 8),),)
    tokens = Tokens.from_hidden(torch.zeros(2, 12, 4), grid=(2, 2, 3)).check()
    assert tokens.grids == (((2, 2, 3),),) * 2
    assert tokens.cell[1, 7:10].tolist() == [[1, 0, 1], [1, 0, 2], [1, 1, 0]]
    assert Tokens.from_hidden(torch.zeros(1, 12, 4), grid=(3, 4)).cell[0, -1].tolist() == [0, 2, 3]
    assert Tokens.from_hidden(torch.zeros(1, 4, 4)).question.embeddings.shape == (1, 0, 4)
    with pytest.raises(InputError, match=r"grid \(3, 5\) holds 15 tokens, but there are 12"):
        Tokens.from_hidden(torch.zeros(1, 12, 4), grid=(3, 5))
    with pytest.raises(InputError, match=r"must be \[B, N, D\], got shape \(12, 4\)"):
        Tokens.from_hidden(torch.zeros(12, 4))


def test_counts():
    tokens = strategies.collate([strategies.sample((1, 2, 2)), strategies.sample((1, 3, 3))])
    assert tokens.counts(4) == (4, 4)
    assert tokens.counts([0, 9]) == (0, 9)
    with pytest.raises(InputError, match="sample 0: cannot keep 5 of 4"):
        tokens.counts(5)
    with pytest.raises(InputError, match="sample 1: cannot keep -1 of 9"):
        tokens.counts((1, -1))
    with pytest.raises(InputError, match="got 3 counts for a batch of 2"):
        tokens.counts((1, 2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": torch.ones(1, 4, dtype=torch.bool)}, r"Tokens.valid: expected shape \(2, 4\), got \(1, 4\)"),
        ({"cell": torch.zeros(2, 4)}, r"Tokens.cell: expected shape \(2, 4, 3\)"),
        ({"position": torch.zeros(2, 2, 4)}, r"Tokens.position: expected \(2, 4\) or \(3, 2, 4\)"),
        ({"question": Question(torch.zeros(2, 3, 9), torch.ones(2, 3))}, r"Tokens.question \(2, 3, 9\) does not fit"),
        ({"sizes": (4, 3)}, r"Tokens.sizes \(4, 3\) differs"),
        ({"origin": torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]])}, "sample 1: origin must ascend within 0 … 3"),
        ({"origin": torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]])}, "sample 0: origin must ascend"),
        (
            {"valid": torch.tensor([[True] * 4, [True, False, True, True]]), "sizes": (4, 3)},
            "sample 1: padding must stand on the right",
        ),
    ],
)
def test_check_refuses_what_breaks_an_invariant(change, message):
    tokens = Tokens.from_hidden(torch.zeros(2, 4, 6)).check()
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tokens, **change).check()
