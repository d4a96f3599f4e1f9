"""Recyclers: golden counts, plain-Python clusters, and SparseVLM's invariants."""

from __future__ import annotations

import numpy as np
import plain
import pytest
import strategies
import torch
from applied import recycled
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenprune.core import gram
from tokenprune.core.tokens import Tokens
from tokenprune.parts.density import prominence
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.recipe import load_recipe

recyclers = st.builds(
    lambda share, per, plus, mean, cosine, width: ClusterRecycler(
        share=share,
        per_cluster=per,
        plus_one=plus,
        reduce="mean" if mean else "sum",
        metric="cosine" if cosine else "l2",
        distance_scale="width" if width else "none",
    ),
    st.sampled_from([0.1, 0.3, 0.9, 1.0]),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def recycle(recycler, sample, count):
    """New tokens, kept indices and anchors, and the scores, of one sample."""
    tokens = strategies.collate([sample])
    scores = tokens.hidden[..., 0].float()
    kept = TopKSampler()(tokens, scores, count)
    new, anchors = recycled(recycler, tokens, kept, scores, count)
    return tokens, new.check(), kept[0].tolist(), anchors[0].tolist(), scores[0]


@pytest.mark.parametrize(
    ("size", "kept", "merged"),
    [
        *[(576, 300, 9), (309, 200, 4), (204, 110, 3), (576, 303, 9), (312, 110, 7), (117, 36, 3)],
        *[(576, 238, 11), (249, 48, 7), (55, 26, 1), (576, 66, 16), (82, 30, 2), (32, 17, 1)],
    ],
)
def test_golden_counts(size, kept, merged):
    """SparseVLM v1.5's published stages: kept + merged = 309, 204, 113; 312, 117, 39; 249, 55, 27; 82, 32, 18."""
    assert ClusterRecycler().added(size - kept) == merged


@settings(max_examples=300)
@given(recyclers, st.integers(0, 5000))
def test_clusters_never_outnumber_the_recycled_nor_those_the_dropped(recycler, dropped):
    assert 0 <= recycler.added(dropped) <= recycler.recycled(dropped) <= dropped
    assert recycler.added(0) == 0
    if recycler.plus_one and dropped:
        assert recycler.added(dropped) >= 1


@pytest.mark.parametrize("dropped", [1, 10, 64, 276, 510])
def test_counts_are_the_released_codes_or_the_papers(dropped):
    code, paper = ClusterRecycler(), ClusterRecycler(plus_one=False)
    assert code.recycled(dropped) == int(0.3 * dropped) + 1
    assert code.added(dropped) == code.recycled(dropped) // 10 + 1
    assert paper.recycled(dropped) == int(0.3 * dropped)
    assert paper.added(dropped) == min(int(0.3 * dropped), max(1, int(0.3 * dropped) // 10))


@settings(max_examples=60)
@given(recyclers, strategies.samples(), st.data())
def test_what_recycling_keeps_and_writes(recycler, sample, data):
    size = len(sample.alive)
    count = data.draw(st.integers(0, size))
    tokens, new, kept, anchors, scores = recycle(recycler, sample, count)
    assert len(anchors) == recycler.added(size - count)
    assert new.sizes == (count + len(anchors),)
    together = sorted(kept + anchors)
    assert len(set(together)) == len(together)  # anchors were dropped
    for name in ("origin", "slot", "position", "cell"):
        assert torch.equal(getattr(new, name)[0], getattr(tokens, name)[0, together])
    at = [together.index(i) for i in kept]
    assert torch.equal(new.hidden[0, at], tokens.hidden[0, kept])
    assert torch.equal(new.mass[0, at], torch.ones(count))
    flowed = recycler.recycled(size - count) if anchors else 0
    assert new.mass.sum() == count + flowed  # every recycled token counts once
    dropped = [i for i in range(size) if i not in kept]
    chosen = [dropped[i] for i in plain.best(scores[dropped].tolist(), flowed)]
    assert set(anchors) <= set(chosen)
    merged = new.hidden[0, [together.index(i) for i in anchors]]
    total = merged * (new.mass[0, [together.index(i) for i in anchors], None] if recycler.reduce == "mean" else 1)
    assert torch.allclose(total.sum(0), tokens.hidden[0, chosen].sum(0), atol=1e-4)  # Σ |c| · mean = Σ x
    if recycler.reduce == "mean" and anchors:
        low, high = tokens.hidden[0, chosen].amin(0), tokens.hidden[0, chosen].amax(0)
        assert ((merged >= low - 1e-5) & (merged <= high + 1e-5)).all()


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 999))
def test_clusters_are_plain_pythons(size, clusters, cosine, divide, seed):
    clusters = min(size, clusters)
    x = torch.randn(1, size, 5, generator=torch.Generator().manual_seed(seed))
    recycler = ClusterRecycler(metric="cosine" if cosine else "l2", distance_scale="width" if divide else "none")
    valid = torch.ones(1, size, dtype=torch.bool)
    centres, member = recycler.clusters(x, None, [clusters])
    expected = plain.density_peaks(x[0].double().numpy(), clusters, cosine, divide)
    assert centres[0].tolist() == list(expected)
    assert [column.nonzero().flatten().tolist() for column in member[0].T] == list(expected.values())
    padded = recycler.clusters(x, valid, [clusters])
    assert torch.equal(padded[0], centres) and torch.equal(padded[1], member)
    densest = prominence(gram.distances(x), None, [1]).argmax().item()  # one neighbour, itself: all equally dense
    assert densest == recycler.clusters(x, None, [1])[0].item()


@settings(max_examples=25)
@given(st.integers(0, 999))
def test_samples_of_different_sizes_are_clustered_by_themselves(seed):
    """Each with its own number of tokens, clusters and neighbours, whatever the largest of the batch has."""
    sizes, counts = [40, 15, 1], [8, 2, 1]
    x = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(40) < torch.tensor(sizes)[:, None]
    centres, member = ClusterRecycler().clusters(x, valid, counts)
    for row, (size, clusters) in enumerate(zip(sizes, counts, strict=True)):
        expected = plain.density_peaks(x[row, :size].double().numpy(), clusters)
        assert centres[row].tolist() == [*expected, *[-1] * (8 - clusters)]
        joined = [column.nonzero().flatten().tolist() for column in member[row].T]
        assert joined == [*expected.values(), *[[]] * (8 - clusters)]


def test_padding_stays_empty_where_the_first_token_is_an_anchor():
    tokens = strategies.collate([strategies.sample((1, 3, 3)), strategies.sample((1, 2, 1), seed=1)])
    scores = torch.arange(9.0).expand(2, 9)
    counts = (8, 1)
    new, anchors = recycled(ClusterRecycler(), tokens, TopKSampler()(tokens, scores, counts), scores, counts)
    assert anchors.tolist() == [[0], [0]]
    assert new.sizes == (9, 2)
    assert (new.mass[~new.valid] == 0).all()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 6), st.booleans())
def test_equal_tokens_are_clustered_by_index(values, clusters, cosine):
    """No noise: of equals the first is the denser one. Every centre stays in its own cluster, none is empty."""
    clusters = min(clusters, len(values))
    x = torch.eye(3)[values][None] * 3
    recycler = ClusterRecycler(metric="cosine" if cosine else "l2")
    centres, member = recycler.clusters(x, torch.ones(1, len(values), dtype=torch.bool), [clusters])
    expected = plain.density_peaks(x[0].double().numpy(), clusters, cosine)
    assert centres[0].tolist() == list(expected)
    assert [column.nonzero().flatten().tolist() for column in member[0].T] == list(expected.values())
    assert (member.sum(2) == 1).all()


@settings(max_examples=25)
@given(st.integers(0, 999))
def test_clusters_do_not_change_when_all_move_or_turn(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 20, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    valid = torch.ones(1, 20, dtype=torch.bool)
    centres, member = ClusterRecycler().clusters(x, valid, [4])
    for other in (x + 3, x @ turn):
        assert torch.equal(ClusterRecycler().clusters(other, valid, [4])[0], centres)
        assert torch.equal(ClusterRecycler().clusters(other, valid, [4])[1], member)
    order = torch.randperm(20, generator=generator)
    shuffled, _ = ClusterRecycler().clusters(x[:, order], valid, [4])
    assert set(order[shuffled[0]].tolist()) == set(centres[0].tolist())


def test_far_tokens_do_not_underflow():
    """exp(-d²) is 0 for all of these in float32, and the first two would be centres; the logarithm can tell."""
    x = 100 * torch.tensor([[0.0], [100.0], [101.0], [500.0], [502.0]])[None]
    centres, _ = ClusterRecycler().clusters(x, torch.ones(1, 5, dtype=torch.bool), [2])
    assert centres.tolist() == [[1, 2]]


def test_as_many_clusters_as_tokens_leave_them_as_they_are():
    sample = strategies.sample((1, 3, 3), seed=3)
    for reduce in ("mean", "sum"):
        recycler = ClusterRecycler(share=1.0, per_cluster=1, plus_one=False, reduce=reduce)
        tokens, new, _, anchors, _ = recycle(recycler, sample, 4)
        assert len(anchors) == 5
        assert torch.equal(new.hidden, tokens.hidden)


def test_sum_is_the_mean_times_the_size_of_the_cluster():
    sample = strategies.sample((1, 6, 6), seed=3)
    _, mean, kept, anchors, _ = recycle(ClusterRecycler(share=1.0), sample, 6)
    _, total, _, _, _ = recycle(ClusterRecycler(share=1.0, reduce="sum"), sample, 6)
    at = [sorted(kept + anchors).index(i) for i in anchors]
    assert torch.allclose(total.hidden[0, at], mean.hidden[0, at] * mean.mass[0, at, None], atol=1e-5)


def test_mass_adds_up_over_two_stages():
    tokens = strategies.collate([strategies.sample((1, 8, 8))])
    for count in (20, 6):
        scores = tokens.hidden[..., 0]
        tokens, _ = recycled(ClusterRecycler(share=1.0), tokens, TopKSampler()(tokens, scores, count), scores, count)
    assert tokens.mass.sum() == 64


def test_one_dropped_token_becomes_itself():
    """R = C = 1: nothing is saved, and nothing is changed."""
    tokens, new, _, anchors, _ = recycle(ClusterRecycler(), strategies.sample((1, 3, 3)), 8)
    assert len(anchors) == 1
    assert torch.equal(new.hidden, tokens.hidden)


@settings(max_examples=25)
@given(strategies.samples(least=12), st.data())
def test_merged_tokens_are_plain_pythons(sample, data):
    values = sample.hidden[:, 0].tolist()
    assume(len(set(values)) == len(values))
    count = data.draw(st.integers(0, len(sample.alive)))
    for reduce in ("mean", "sum"):
        _, new, kept, anchors, scores = recycle(ClusterRecycler(reduce=reduce), sample, count)
        expected_kept, expected = plain.sparsevlm_stage(
            sample.hidden.double().numpy(), scores.double().numpy(), count, mean=reduce == "mean"
        )
        assert kept == expected_kept
        assert anchors == sorted(expected)
        at = [sorted(kept + anchors).index(i) for i in anchors]
        for row, anchor in zip(new.hidden[0, at], anchors, strict=True):
            np.testing.assert_allclose(row, expected[anchor], atol=1e-5)


def test_half_precision_tokens_are_clustered_in_float32_and_keep_their_dtype():
    hidden = torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(0)).half() * 300  # squares overflow float16
    tokens = Tokens.from_hidden(hidden)
    scores = torch.arange(64.0)[None]
    new, anchors = recycled(ClusterRecycler(), tokens, TopKSampler()(tokens, scores, 10), scores, 10)
    assert new.hidden.dtype == torch.float16
    assert new.hidden.isfinite().all()
    assert anchors.shape == (1, 2)


def test_drop_leaves_the_kept():
    tokens, new, kept, anchors, _ = recycle(DropRecycler(), strategies.sample((1, 3, 3)), 4)
    assert anchors == []
    assert torch.equal(new.hidden, tokens.hidden[:, kept])
    assert DropRecycler().added(7) == 0


@given(st.integers(2, 20), st.integers(0, 999), st.data())
def test_one_cluster_of_all_that_is_dropped_is_their_mean(n, seed, data):
    """TRIM's token of the rest, one for any number; it stands at one of them."""
    recycler = load_recipe("trim").build_stages()[0].recycler
    generator = torch.Generator().manual_seed(seed)
    tokens = Tokens.from_hidden(torch.randn(1, n, 4, generator=generator))
    keep = data.draw(st.integers(1, n - 1))
    kept = torch.randperm(n, generator=generator)[:keep].sort().values
    dropped = [i for i in range(n) if i not in kept.tolist()]
    after, anchors = recycled(recycler, tokens, kept[None], torch.rand(1, n, generator=generator), keep)
    assert recycler.added(len(dropped)) == 1 and anchors[0].tolist()[0] in dropped
    place = after.origin[0].tolist().index(anchors[0].tolist()[0])
    assert torch.allclose(after.hidden[0, place], tokens.hidden[0, dropped].mean(0), atol=1e-6)
    assert after.mass[0, place] == len(dropped)
