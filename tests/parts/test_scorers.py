"""Scorers, against plain Python where papers define them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import plain
import pytest
import strategies
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenprune.core.needs import Needs
from tokenprune.core.signals import Signal, Signals
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.raters.text import AllTextRaters, LastTextRaters
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.parts.scorers.baseline import ConstantScorer, RandomScorer, RasterScorer
from tokenprune.parts.scorers.features import DensityPeaksScorer, NormScorer


@dataclasses.dataclass
class Given:
    """An Attention that returns what it was given and remembers what it was asked."""

    heads: torch.Tensor
    asked: dict[str, object] = dataclasses.field(default_factory=dict)

    def scores(self, raters, **asked):
        self.asked = asked
        return self.heads

    def matrix(self, raters, **asked):
        raise AssertionError


@settings(max_examples=25)
@given(strategies.samples(least=1, texts=1))
def test_attention_is_the_mean_over_heads_and_raters(sample):
    tokens = strategies.collate([sample])
    columns = range(len(sample.alive))
    length = len(sample.alive) + len(sample.text)
    full = plain.eager_attention(sample.q.double().numpy(), sample.k.double().numpy())
    rows = range(len(sample.alive), length)
    got = AttentionScorer()(tokens, AllTextRaters()(tokens))[0]
    np.testing.assert_allclose(got, plain.attention_scores(full, rows, columns), atol=1e-5)
    got = AttentionScorer(rope=False, normalise="vision")(tokens, LastTextRaters()(tokens))[0]
    q = sample.q.flip(-1).double().numpy()  # what stands for "before the rotary embedding" in strategies.py
    np.testing.assert_allclose(got, plain.feather_scores(q, sample.k.double().numpy(), columns, length - 1), atol=1e-5)


def test_attention_asks_for_what_it_was_told():
    attention = Given(torch.zeros(1, 2, 4))
    tokens = dataclasses.replace(Tokens.from_hidden(torch.zeros(1, 4, 6)), attention=attention)
    scorer = AttentionScorer(rope=False, normalise="vision", layer="next", gravity=True)
    scorer(tokens, torch.zeros(1, 0))
    assert attention.asked == {"rope": False, "normalise": "vision", "layer": "next", "gravity": True}
    assert scorer.reads == Needs(attention="next")
    assert AttentionScorer().reads == Needs(attention="previous")
    assert NormScorer().reads == Needs()


def test_priority_heads_are_chosen_per_sample_by_their_mass():
    heads = torch.tensor(
        [
            [[0.1, 0.1], [0.5, 0.3], [0.0, 0.7]],
            [[0.9, 0.0], [0.2, 0.2], [0.1, 0.0]],
            [[0.2, 0.0], [0.0, 0.2], [0.1, 0.1]],
        ]
    )
    tokens = dataclasses.replace(Tokens.from_hidden(torch.zeros(3, 2, 6)), attention=Given(heads))
    raters = torch.zeros(3, 0)
    got = AttentionScorer(heads=2)(tokens, raters)
    assert torch.allclose(got, torch.tensor([[0.25, 0.5], [0.55, 0.1], [0.1, 0.1]]))  # of equal heads the first
    assert torch.equal(AttentionScorer(heads=3)(tokens, raters), heads.mean(1))
    assert torch.equal(AttentionScorer(heads=64)(tokens, raters), heads.mean(1))


def test_errors_say_what_is_missing():
    tokens = Tokens.from_hidden(torch.zeros(2, 4, 6))
    with pytest.raises(InputError, match="none at this place"):
        AttentionScorer()(tokens, torch.zeros(2, 0))
    stale = dataclasses.replace(tokens, attention=Given(torch.zeros(2, 3, 9)))
    with pytest.raises(InputError, match="needs raters"):
        AttentionScorer()(stale)
    with pytest.raises(InputError, match="covers 9 vision tokens of 2 samples, the stage has 4 of 2"):
        AttentionScorer()(stale, torch.zeros(2, 0))


@settings(max_examples=25)
@given(strategies.batches(), st.integers(0, 5))
def test_random_depends_on_seed_and_original_index_alone(batch, seed):
    tokens = strategies.collate(batch)
    scores = RandomScorer(seed=seed)(tokens)
    whole = RandomScorer(seed=seed)(strategies.collate([strategies.sample((1, 12, 12), seed=5)]))[0]
    for i, sample in enumerate(batch):
        assert torch.equal(scores[i, : len(sample.alive)], whole[list(sample.alive)])
    assert not torch.equal(whole, RandomScorer(seed=seed + 1)(strategies.collate([strategies.sample((1, 12, 12))]))[0])


def test_norms_of_half_precision_tokens_do_not_overflow():
    tokens = Tokens.from_hidden(torch.tensor([[[60_000.0] * 4, [50_000.0] * 4]]).half())
    high, low = NormScorer()(tokens)[0].tolist()
    assert torch.inf > high > low > 65_504


def test_plain_scorers_by_hand():
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]]).bfloat16()
    tokens = dataclasses.replace(Tokens.from_hidden(hidden), origin=torch.tensor([[2, 5, 9]]))
    assert NormScorer()(tokens).tolist() == [[5, 1, 10]]
    assert NormScorer(order="low")(tokens).tolist() == [[-5, -1, -10]]
    assert RasterScorer()(tokens).tolist() == [[2, 5, 9]]
    assert ConstantScorer()(tokens).tolist() == [[0, 0, 0]]


@settings(max_examples=25)
@given(strategies.batches(), st.integers(1, 7))
def test_density_peaks_are_those_of_the_definition(batch, neighbours):
    tokens = strategies.collate(batch)
    scores = DensityPeaksScorer(neighbours=neighbours)(tokens)
    for i, size in enumerate(tokens.sizes):
        x = tokens.hidden[i, :size].double()
        density = sorted(plain.densities(torch.cdist(x, x).numpy() / x.shape[1] ** 0.5, neighbours))
        assume(all(b - a > 1e-6 or b == a for a, b in pairwise(density)))  # else rounding decides which is the denser
        expected = plain.prominences(x.numpy(), neighbours)
        np.testing.assert_allclose(scores[i, :size], expected, rtol=1e-3, atol=1e-3)
    assert (scores[~tokens.valid] == -torch.inf).all()


def test_density_peaks_read_the_tokens_as_they_entered_the_model():
    generator = torch.Generator().manual_seed(0)
    entered = torch.randn(1, 9, 4, generator=generator)
    whole = Tokens.from_hidden(entered)
    later = dataclasses.replace(
        whole, hidden=torch.randn(1, 9, 4, generator=generator), signals=Signals({"embedding": Signal(entered)})
    )
    assert torch.equal(DensityPeaksScorer()(later), DensityPeaksScorer()(whole))
    index = torch.tensor([[1, 4, 8]])
    fewer = DensityPeaksScorer()(later.take(index, (3,)))
    assert torch.equal(fewer, DensityPeaksScorer()(Tokens.from_hidden(entered[:, [1, 4, 8]])))
