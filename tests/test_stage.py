"""A whole stage: the papers' methods against plain Python, golden counts, identity, errors, one graph."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import plain
import pytest
import strategies
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenprune as tp
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.raters.text import AboveMeanRaters, LastTextRaters
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler, UnionSampler
from tokenprune.parts.samplers.even import RandomSampler, UniformSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler, PyramidScheduler
from tokenprune.parts.schedulers.lattice import LatticeScheduler
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.scorers.baseline import ConstantScorer, RandomScorer
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.stage import Stage

HERE = Place("before_layer", 3)


def stage(**parts):
    parts = {"scorer": ConstantScorer(), "sampler": TopKSampler(), "recycler": DropRecycler(), **parts}
    return Stage(place=HERE, **parts)


def sparsevlm(keep):
    return stage(
        scheduler=FixedScheduler(keep=keep),
        raters=AboveMeanRaters(),
        scorer=AttentionScorer(),
        recycler=ClusterRecycler(),
    )


def fastv(keep):
    return stage(scheduler=FixedScheduler(keep=keep), raters=LastTextRaters(), scorer=AttentionScorer())


def feather(keep, stride):
    return stage(
        scheduler=LatticeScheduler(stride=stride, keep=keep),
        raters=LastTextRaters(),
        scorer=AttentionScorer(rope=False, normalise="vision"),
        sampler=UnionSampler(stride=stride),
    )


def numbers(sample):
    """Full attention of a sample, its q (without rotary embedding) and k, and its vision places."""
    q, k = sample.q.double().numpy(), sample.k.double().numpy()
    return plain.eager_attention(q, k), sample.q.flip(-1).double().numpy(), k, range(len(sample.alive))


def far_apart(scores):
    """Whether float32 tells these scores apart as float64 does."""
    return len(scores) < 2 or np.diff(np.sort(scores)).min() > 1e-5


two = st.lists(
    st.builds(
        lambda seed, height, width, texts: strategies.sample((1, height, width), seed=seed, texts=texts),
        st.integers(0, 9999),
        st.integers(3, 6),
        st.integers(3, 6),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=2,
)


def kept_of(result, row):
    return [i for i in result.kept[row].tolist() if i >= 0]


@settings(max_examples=25)
@given(two, st.floats(0.1, 0.9))
def test_fastv_keeps_what_plain_python_keeps(batch, keep):
    result = fastv(keep)(strategies.collate(batch))
    for row, sample in enumerate(batch):
        attention, _, _, columns = numbers(sample)
        last = attention.shape[1] - 1
        assume(far_apart(plain.attention_scores(attention, [last], columns)))
        assert kept_of(result, row) == plain.fastv(attention, columns, last, max(1, int(keep * sample.total)))


@settings(max_examples=25)
@given(two, st.sampled_from([0.1, 0.3, 0.6]), st.integers(2, 4))
def test_feather_keeps_what_plain_python_keeps(batch, keep, stride):
    """The scheduler counts the union, the sampler takes it, and both are the paper's union, sample by sample."""
    result = feather(keep, stride)(strategies.collate(batch))
    for row, sample in enumerate(batch):
        _, q, k, columns = numbers(sample)
        _, height, width = sample.grids[0]
        scores = plain.feather_scores(q, k, columns, q.shape[1] - 1)
        assume(far_apart(scores))
        best = max(1, int(keep * sample.total + 1e-9))
        assert kept_of(result, row) == plain.feather(scores, best, height, width, stride)


@settings(max_examples=25)
@given(two, st.integers(1, 9))
def test_sparsevlm_keeps_and_merges_what_plain_python_does(batch, keep):
    tokens = strategies.collate(batch)
    result = sparsevlm(keep)(tokens)
    for row, sample in enumerate(batch):
        attention, _, _, columns = numbers(sample)
        raters = plain.above_mean_raters(sample.hidden.double().numpy(), sample.text.double().numpy())
        rows = [len(columns) + i for i in raters]
        scores = plain.attention_scores(attention, rows, columns)
        assume(far_apart(scores))
        kept, merged = plain.sparsevlm_stage(sample.hidden.double().numpy(), scores, min(keep, len(columns)))
        assert kept_of(result, row) == kept
        assert [i for i in result.merged[row].tolist() if i >= 0] == sorted(merged)
        together = sorted([*kept, *merged])
        assert result.tokens.origin[row, : result.tokens.sizes[row]].tolist() == together
        for anchor, vector in merged.items():
            np.testing.assert_allclose(result.tokens.hidden[row, together.index(anchor)], vector, atol=1e-5)


GOLDEN = {
    "192": [(300, 9), (200, 4), (110, 3)],
    "128": [(303, 9), (110, 7), (36, 3)],
    "96": [(238, 11), (48, 7), (26, 1)],
    "64": [(66, 16), (30, 2), (17, 1)],
}
TRACES = {"192": [309, 204, 113], "128": [312, 117, 39], "96": [249, 55, 27], "64": [82, 32, 18]}
AVERAGES = {"192": (192.03125, 206.5), "128": (128.625, 145.40625), "96": (96.9375, 114.09375), "64": (64.8125, 82.25)}


@pytest.mark.parametrize("budget", GOLDEN)
def test_sparsevlm_stages_have_their_golden_sizes(budget):
    """Kept + merged at layers 3, 7 and 16; averages over layer outputs (published) and inputs (what is paid)."""
    tokens = Tokens.from_hidden(torch.randn(2, 576, 4, generator=torch.Generator().manual_seed(0)))
    sizes = [576]
    for kept, merged in GOLDEN[budget]:
        reduce = stage(scheduler=FixedScheduler(keep=kept), scorer=NormScorer(), recycler=ClusterRecycler())
        result = reduce(tokens)
        assert result.kept.shape == (2, kept)
        assert result.merged.shape == (2, merged)
        tokens = result.tokens.check()
        sizes.append(tokens.sizes[0])
    assert sizes[1:] == TRACES[budget]
    outputs = sum(n * w for n, w in zip(sizes, (2, 4, 9, 17), strict=True)) / 32
    inputs = sum(n * w for n, w in zip(sizes, (3, 4, 9, 16), strict=True)) / 32
    assert (outputs, inputs) == AVERAGES[budget]


def test_feathers_two_stages_leave_24_of_275():
    tokens = Tokens.from_hidden(torch.randn(1, 729, 4, generator=torch.Generator().manual_seed(0)))
    first = stage(
        scheduler=LatticeScheduler(stride=3, keep=0.3, size="fixed"), scorer=NormScorer(), sampler=UnionSampler()
    )
    second = stage(scheduler=PyramidScheduler(keep=0.3**2), scorer=NormScorer())
    one = first(tokens)
    two = second(one.tokens)
    assert (one.tokens.sizes, two.tokens.sizes) == ((275,), (24,))
    assert set(two.kept[0].tolist()) < set(one.kept[0].tolist())  # original indices, through both


@pytest.mark.parametrize(
    "whole",
    [
        stage(scheduler=FixedScheduler(keep=1.0), scorer=AttentionScorer(), recycler=ClusterRecycler()),
        stage(scheduler=RankRatioScheduler(scale=0.0), raters=LastTextRaters(), recycler=ClusterRecycler()),
        stage(scheduler=LatticeScheduler(stride=1)),
    ],
    ids=["static", "adaptive", "lattice"],
)
def test_to_keep_all_is_the_identity(whole):
    """Even one that could not run: nothing is scored, merged or copied. The released SparseVLM always drops one."""
    tokens = strategies.collate([strategies.sample((1, 4, 4)), strategies.sample((1, 2, 3), seed=1)])
    result = whole(tokens)
    assert result.tokens is tokens
    assert torch.equal(result.kept, tokens.origin)
    assert result.merged.shape == (2, 0)
    assert result.scores is None


def test_a_count_from_a_budget_overrules_the_scheduler():
    tokens = strategies.collate([strategies.sample((1, 4, 4)), strategies.sample((1, 2, 3), seed=1)])
    result = stage(scheduler=FixedScheduler(keep=0.5))(tokens, (3, 6))
    assert result.tokens.sizes == (3, 6)
    assert result.kept.tolist() == [[0, 1, 2, -1, -1, -1], list(range(6))]
    with pytest.raises(InputError, match="sample 1: cannot keep 7 of 6"):
        stage(scheduler=FixedScheduler(keep=0.5))(tokens, 7)


class BrokenScorer(Scorer):
    def forward(self, tokens, raters=None):
        return torch.full_like(tokens.mass, torch.nan)


def test_nan_scores_are_refused_by_name_and_place():
    tokens = Tokens.from_hidden(torch.zeros(1, 9, 4))
    with pytest.raises(InputError, match=r"stage \(before_layer: 3\): scorer 'broken' gave NaN scores"):
        stage(scheduler=FixedScheduler(keep=2), scorer=BrokenScorer())(tokens)


def test_attention_from_before_another_stage_is_refused():
    tokens = strategies.collate([strategies.sample((1, 4, 4))])
    once = fastv(0.5)(tokens).tokens
    with pytest.raises(InputError, match="covers 16 vision tokens of 1 samples, the stage has 8 of 1"):
        fastv(0.2)(once)


STATIC = {
    "sparsevlm": sparsevlm(5),
    "fastv": fastv(0.5),
    "feather": stage(
        scheduler=LatticeScheduler(stride=2, keep=0.3, size="fixed"),
        raters=LastTextRaters(),
        scorer=AttentionScorer(rope=False, normalise="vision", heads=2),
        sampler=UnionSampler(stride=2),
    ),
    "uniform": stage(scheduler=FixedScheduler(keep=5), sampler=UniformSampler()),
    "random": stage(scheduler=PyramidScheduler(keep=0.4), scorer=RandomScorer(), sampler=RandomSampler()),
}


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", STATIC)
def test_static_stages_compile_to_one_graph_and_not_again_for_the_same_shape(name):
    from torch._dynamo.testing import CompileCounter

    whole, counter = STATIC[name], CompileCounter()
    torch._dynamo.reset()

    def tensors(tokens):
        result = whole(tokens)
        return result.tokens.hidden, result.tokens.origin, result.tokens.mass, result.kept, result.merged

    compiled = torch.compile(tensors, fullgraph=True, backend=counter)
    for seed in (0, 1):
        tokens = strategies.collate([strategies.sample((1, 4, 4), seed=seed)] * 2, garbage=0.0)
        for got, expected in zip(compiled(tokens), tensors(tokens), strict=True):
            assert torch.allclose(got, expected, atol=1e-6)
    assert counter.frame_count == 1


@settings(max_examples=15)
@given(strategies.batches(texts=1), st.data())
def test_an_adaptive_stage_counts_each_sample_by_itself(batch, data):
    adaptive = stage(
        scheduler=RankRatioScheduler(scale=data.draw(st.sampled_from([0.3, 0.7, 1.0])), energy=0.9),
        raters=AboveMeanRaters(),
        scorer=AttentionScorer(),
        recycler=ClusterRecycler(),
    )
    together = adaptive(strategies.collate(batch, extra=1))
    for row, sample in enumerate(batch):
        alone = adaptive(strategies.collate([sample]))
        assert together.tokens.sizes[row] == alone.tokens.sizes[0]
        assert kept_of(together, row) == kept_of(alone, 0)


def test_what_a_stage_does_not_name_is_as_in_a_recipe() -> None:
    made = tp.Stage(place="after_vision", name="stage_0")
    (read,) = tp.build({"version": 1, "budget": {"keep": 3}, "stages": [{"place": "after_vision"}]})
    assert repr(made) == repr(read)
    for place, parsed in (
        (3, Place("before_layer", 3)),
        ({"in_vision": {"block": "1/4"}}, Place("in_vision", Fraction(1, 4))),
        (Place("after_vision"), Place("after_vision")),
    ):
        assert tp.Stage(place=place).place == parsed
    with pytest.raises(RecipeError, match=r"place: should be after_vision, .* \(got 'after_vison'\) \(did"):
        tp.Stage(place="after_vison")


def test_places_stand_in_the_order_of_a_forward() -> None:
    places = [Place("in_vision", 3), Place("in_vision", 9), Place("after_vision"), Place("before_layer", 0)]
    places += [Place("before_layer", 4)]
    assert [[a.precedes(b) for b in places] for a in places] == [[i < j for j in range(5)] for i in range(5)]
    share = Place("before_layer", Fraction(1, 4))
    assert not share.precedes(places[-1]) and not places[-1].precedes(share)
    assert all(Place.parse(place.to_plain()) == place for place in (*places, share))
    with pytest.raises(RecipeError, match="in_vision: block 3 comes before after_vision: put the stages in order"):
        tp.Pipeline([tp.Stage(place="after_vision"), tp.Stage(place=places[0])], depth=8)


def test_a_part_by_name() -> None:
    assert tp.part("scheduler", "fixed", keep=3).settings() == {"keep": 3}
    for ask, message in (
        (lambda: tp.part("scheduler", "fixd"), r"unknown scheduler 'fixd' \(did you mean 'fixed'"),
        (lambda: tp.part("scheduler", "fixed"), "scheduler 'fixed': missing setting 'keep'"),
        (lambda: tp.part("sampler", "uniform", strid=2), r"unknown setting 'strid' \(did you mean 'stride'\?\); known"),
    ):
        with pytest.raises(tp.TokenPruneError, match=message):
            ask()
