"""Greedy samplers: the picks of plain Python, a prefix for every count, a bound of optimum, and tokens all alike."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import plain_greedy as plain
import plain_layers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core import gram, greedy
from tokenprune.core.tokens import Tokens
from tokenprune.parts.samplers.greedy import (
    DeterminantSampler,
    FacilityLocationSampler,
    MaxMinSampler,
    MaxSumSampler,
    QuestionCoverageSampler,
    SuppressSampler,
)

SAMPLERS = [
    MaxMinSampler(),
    MaxSumSampler(),
    FacilityLocationSampler(),
    FacilityLocationSampler(weight_on="covered", similarity="shifted", power=2.0),
    FacilityLocationSampler(weight_on="candidate"),
    QuestionCoverageSampler(text_temperature=0.3),
    DeterminantSampler(),
    DeterminantSampler(kernel="quadratic"),
    SuppressSampler(threshold=0.2),
]
each = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


def by_hand(sampler, x, text, scores, count):
    """The sampler's method in plain Python: picks in order."""
    alike = plain.cosines(x, x)
    share = scores / scores.max()
    if isinstance(sampler, MaxMinSampler):
        return plain.max_min(x, count)
    if isinstance(sampler, MaxSumSampler):
        return plain_layers.max_sum(x, count)
    if isinstance(sampler, SuppressSampler):
        return plain.suppress(scores, alike, sampler.threshold, count)
    if isinstance(sampler, QuestionCoverageSampler):
        rows = plain.mmtok_rows(text, x, x, sampler.text_temperature, sampler.vision_temperature, sampler.vision_weight)
        return plain.facility_location(rows, count)
    if isinstance(sampler, DeterminantSampler):
        r = (scores - scores.min()) / (scores.max() - scores.min()) + 1e-6
        kernel = r[:, None] * alike * r if sampler.kernel == "relevance" else plain.otprune_kernel(x)
        return plain.determinant(kernel, count)
    alike = (1 + alike) / 2 if sampler.similarity == "shifted" else alike
    weights = share**sampler.power
    return plain.facility_location(
        alike,
        count,
        covered=weights if sampler.weight_on == "covered" else None,
        candidate=weights if sampler.weight_on == "candidate" else None,
    )


@each
@settings(max_examples=12)
@given(st.integers(1, 11), st.integers(0, 10_000), st.data())
def test_the_picks_are_those_of_plain_python(sampler, n, seed, data):
    generator = torch.Generator().manual_seed(seed)
    hidden, text = torch.randn(2, n, 16, generator=generator), torch.randn(2, 3, 16, generator=generator)
    scores = torch.rand(2, n, generator=generator) + 0.01
    if n == 1:
        scores[:] = 0.5
    count = data.draw(st.integers(1, n if not isinstance(sampler, DeterminantSampler) or n == 1 else n - 1))
    if n == 1:
        count = 1
        assert sampler(Tokens.from_hidden(hidden, text=text), scores, 1).tolist() == [[0], [0]]
        return
    kept = sampler(Tokens.from_hidden(hidden, text=text), scores, count)
    for row in range(2):
        x, t, s = (v[row].double().numpy() for v in (hidden, text, scores))
        assert kept[row].tolist() == sorted(by_hand(sampler, x, t, s, count))


def test_the_quadratic_kernel_is_that_of_its_paper():
    """Its picks say little of the identity in it: random tokens differ by more."""
    hidden = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0))
    gain = DeterminantSampler(kernel="quadratic").gain(Tokens.from_hidden(hidden), torch.zeros(1, 7), 3)
    expected = np.diagonal(plain.otprune_kernel(hidden[0].double().numpy()))
    assert np.allclose(gain.value[0].numpy(), expected, atol=1e-5)


@each
def test_a_smaller_count_is_a_part_of_a_larger_one(sampler):
    generator = torch.Generator().manual_seed(3)
    tokens = Tokens.from_hidden(torch.randn(1, 25, 6, generator=generator), text=torch.randn(1, 2, 6))
    scores = torch.rand(1, 25, generator=generator)
    before: set[int] = set()
    for count in range(1, 26):
        kept = set(sampler(tokens, scores, count)[0].tolist())
        assert len(kept) == count
        assert before < kept
        before = kept


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["zero", "constant", "duplicated", "huge"])
def test_tokens_all_alike_still_make_the_count(sampler, dtype, kind):
    hidden = {
        "zero": torch.zeros(1, 12, 4),
        "constant": torch.ones(1, 12, 4),
        "duplicated": torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1),
        "huge": 6e4 * torch.eye(12)[None, :, :4],
    }[kind].to(dtype)
    tokens = Tokens.from_hidden(hidden, text=torch.zeros(1, 2, 4, dtype=dtype))
    for scores in (torch.zeros(1, 12), torch.linspace(-1, 1, 12)[None]):
        for count in (1, 7, 12):
            kept = sampler(tokens, scores, count)[0].tolist()
            assert kept == sorted(set(kept))
            assert len(kept) == count
            assert 0 <= kept[0] <= kept[-1] < 12


@pytest.mark.parametrize(
    "sampler", [s for s in SAMPLERS if isinstance(s, MaxMinSampler | DeterminantSampler)], ids=repr
)
def test_of_four_copies_of_three_tokens_each_is_picked_once_first(sampler):
    hidden = torch.eye(3).repeat(4, 1)[None] + 0.1
    kept = sampler(Tokens.from_hidden(hidden, grid=(3, 4)), torch.full((1, 12), 0.5), 3)
    assert kept.tolist() == [[0, 1, 2]]


@settings(max_examples=15)
@given(st.integers(2, 8), st.integers(0, 1000), st.data())
def test_coverage_is_within_the_bound_of_the_best_set(n, seed, data):
    alike = gram.cosines(torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed)))
    count = data.draw(st.integers(1, n))
    (picks,) = greedy.greedy(greedy.Coverage(alike), [count]).tolist()
    plain_alike, ones = alike[0].double().numpy(), [1.0] * n
    best = max(plain.cover(plain_alike, chosen, ones) for chosen in combinations(range(n), count))
    assert plain.cover(plain_alike, picks, ones) >= (1 - 1 / np.e) * best - 1e-6


@pytest.mark.parametrize("weights", ["none", "covered", "candidate"])
def test_coverage_by_rows_is_coverage_over_all(weights):
    """On a CPU only rows that grow are gone over; elsewhere all are."""
    generator = torch.Generator().manual_seed(0)
    alike = gram.cosines(torch.randn(2, 300, 8, generator=generator))
    given_weights = {} if weights == "none" else {weights: torch.rand(2, 300, generator=generator)}
    sparse, dense = greedy.Coverage(alike, **given_weights), greedy.Coverage(alike, **given_weights)
    assert sparse._sparse
    dense._sparse = False
    order = greedy.greedy(sparse, [60, 45])
    assert torch.equal(order, greedy.greedy(dense, [60, 45]))
    assert order[1, 45:].tolist() == [-1] * 15
    assert torch.allclose(sparse.value, dense.value, atol=1e-4)
