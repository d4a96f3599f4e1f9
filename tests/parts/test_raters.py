"""Rater selectors: SparseVLM's equations 4 to 6, and their traps."""

from __future__ import annotations

import dataclasses

import numpy as np
import plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core import ops
from tokenprune.core.signals import Signal, Signals
from tokenprune.core.tokens import Tokens
from tokenprune.parts.raters.text import AboveMeanRaters, AllTextRaters, LastTextRaters

RATERS = [AboveMeanRaters(), AboveMeanRaters(threshold="above"), LastTextRaters(), AllTextRaters()]


def chosen(weights):
    return [row.nonzero().flatten().tolist() for row in weights]


@pytest.mark.parametrize("raters", RATERS, ids=repr)
@settings(max_examples=25)
@given(strategies.batches(), st.booleans(), strategies.dtypes)
def test_weights_sum_to_one_on_valid_text(raters, batch, left, dtype):
    tokens = strategies.collate(batch, left=left, dtype=dtype)
    weights = raters(tokens)
    assert (weights >= 0).all()
    assert weights.shape == tokens.question.valid.shape
    has_text = tokens.question.valid.any(1)
    assert torch.allclose(weights.sum(1)[has_text], torch.ones(int(has_text.sum())))
    assert (weights[~tokens.question.valid] == 0).all()


@pytest.mark.parametrize("raters", RATERS, ids=repr)
@settings(max_examples=25)
@given(strategies.batches(least=1), st.data())
def test_weights_of_a_prompt_are_the_same_at_every_place(raters, batch, data):
    """Which is what `per_prompt` says: the engine then asks once."""
    assert raters.per_prompt
    tokens = strategies.collate(batch)
    first = dataclasses.replace(tokens, signals=Signals({"embedding": Signal(tokens.hidden, tokens.valid)}))
    counts = tokens.counts([data.draw(st.integers(0, size)) for size in tokens.sizes])
    later = first.take(ops.top_k(torch.rand(tokens.valid.shape), counts, tokens.valid), counts)
    later = dataclasses.replace(later, hidden=later.hidden + 1, attention=None)
    assert torch.equal(raters(later), raters(first))
    assert torch.equal(raters(first), raters(tokens))


@settings(max_examples=50)
@given(strategies.samples(least=1, texts=1))
def test_above_mean_is_the_papers_rule(sample):
    tokens = strategies.collate([sample])
    expected = plain.above_mean_raters(sample.hidden.double().numpy(), sample.text.double().numpy())
    weights = AboveMeanRaters()(tokens)
    assert chosen(weights) == [expected]
    assert torch.allclose(weights[weights > 0], torch.tensor(1 / len(expected)))


@settings(max_examples=25)
@given(strategies.samples(least=2, texts=2))
def test_shares_are_votes(sample):
    """Sum 1; in another vision order the same, in another text order moved along; a shift of all text is no matter."""
    shares = lambda s: AboveMeanRaters().shares(strategies.collate([s]))[0]  # noqa: E731
    own = shares(sample)
    assert torch.isclose(own.sum(), torch.tensor(1.0))
    assert (own >= 0).all()
    assert torch.allclose(shares(dataclasses.replace(sample, hidden=sample.hidden.flip(0))), own, atol=1e-6)
    assert torch.allclose(shares(dataclasses.replace(sample, text=sample.text.flip(0))), own.flip(0), atol=1e-6)
    assert torch.allclose(shares(dataclasses.replace(sample, text=sample.text + torch.arange(6) / 9)), own, atol=1e-4)


@pytest.mark.parametrize("texts", [1, 2, 3, 7])
def test_equal_shares_are_at_least_the_mean_and_not_above_it(texts):
    """The released code selects nobody here, or by rounding somebody, and its scores become NaN."""
    sample = dataclasses.replace(strategies.sample((1, 3, 3)), text=torch.full((texts, 6), 0.37), q=torch.zeros(0))
    tokens = Tokens.from_hidden(sample.hidden[None], text=sample.text[None])
    assert chosen(AboveMeanRaters()(tokens)) == [list(range(texts))]
    assert chosen(AboveMeanRaters(threshold="above")(tokens)) == [[texts - 1]]  # the fallback: the last text token


def test_original_embeddings_are_rated_where_hidden_states_are_none():
    tokens = Tokens.from_hidden(torch.randn(1, 4, 6), text=torch.eye(6)[None])
    embedding = torch.zeros(1, 9, 6)
    embedding[:, :, 2] = 5  # all nine original tokens vote for text token 2
    embedding[:, 7:] = torch.nan
    entered = Signals({"embedding": Signal(embedding, torch.arange(9)[None] < 7)})
    assert chosen(AboveMeanRaters()(dataclasses.replace(tokens, signals=entered))) == [[2]]
    embedding[:, 7:] = embedding[:, :2]
    entered = Signals({"embedding": Signal(embedding)})
    assert chosen(AboveMeanRaters()(dataclasses.replace(tokens, signals=entered))) == [[2]]


def test_half_precision_embeddings_do_not_overflow():
    """4096 products of 60 · 60 overflow float16."""
    vision, text = torch.full((1, 2, 4096), 60.0).half(), torch.full((1, 2, 4096), 60.0).half()
    text[:, 1] = 30
    tokens = Tokens.from_hidden(vision, text=text)
    assert chosen(AboveMeanRaters()(tokens)) == [[0]]


def test_last_and_all_under_padding_on_either_side():
    valid = torch.tensor([[True, True, False], [False, True, True], [False, False, False], [True, False, True]])
    tokens = Tokens.from_hidden(torch.zeros(4, 1, 6), text=torch.zeros(4, 3, 6), text_valid=valid)
    assert LastTextRaters()(tokens).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert np.allclose(AllTextRaters()(tokens), [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0.5]])
