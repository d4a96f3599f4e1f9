"""What holds for every part: rows do not mix, padding does not matter, no randomness, any dtype, one graph."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import strategies
import torch
from applied import recycled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from tokenprune import registry
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.contract import Contract
from tokenprune.parts.groupers.geometric import ImageGrouper
from tokenprune.parts.groupers.principal import PrincipalGrouper
from tokenprune.parts.groupers.stretch import StretchGrouper
from tokenprune.parts.groupers.video import FrameGrouper, SceneGrouper
from tokenprune.parts.learned import Host, Learned
from tokenprune.parts.part import Part
from tokenprune.parts.recyclers.absorb import AbsorbRecycler
from tokenprune.parts.recyclers.bipartite import BipartiteRecycler
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.recyclers.nearest import NearestRecycler
from tokenprune.parts.recyclers.transport import TransportRecycler
from tokenprune.parts.samplers import greedy
from tokenprune.parts.samplers.by_score import TopKSampler, UnionSampler
from tokenprune.parts.samplers.even import RandomSampler, UniformSampler
from tokenprune.parts.samplers.passes import BestFirstSampler, TowerFirstSampler
from tokenprune.parts.samplers.pivot import PivotSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler, PyramidScheduler, TableScheduler
from tokenprune.parts.schedulers.lattice import LatticeScheduler
from tokenprune.parts.schedulers.outliers import OutliersScheduler
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.schedulers.reference import AboveReferenceScheduler
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.parts.scorers.baseline import RandomScorer
from tokenprune.parts.scorers.dual_expert import DualExpertScorer
from tokenprune.parts.scorers.features import DensityPeaksScorer, NormScorer
from tokenprune.parts.scorers.layers import AffinityScorer, ChangeScorer
from tokenprune.parts.scorers.mask import MaskScorer
from tokenprune.parts.scorers.question import QuestionScorer
from tokenprune.parts.scorers.tower import ClassAttentionScorer
from tokenprune.parts.scorers.video import OutlierScorer, TemporalChangeScorer

WITH_ARGUMENTS: list[Part] = [
    *(registry.get("raters", "above_mean")(threshold=t) for t in ("at_least", "above")),
    AttentionScorer(rope=False, normalise="vision"),
    AttentionScorer(heads=2),
    RandomScorer(seed=7),
    NormScorer(order="low"),
    QuestionScorer(words="focused", overall=0.5),
    QuestionScorer(states="here"),
    MaskScorer(boxes=[[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.3]]),
    *(DualExpertScorer(norm=norm, combine="max") for norm in ("minmax", "softmax")),
    *(QuestionScorer(words=words, sign="unlike") for words in ("last", "max")),
    DensityPeaksScorer(neighbours=2),
    DensityPeaksScorer(features="hidden", window=3),
    FixedScheduler(keep=3),
    FixedScheduler(keep=0.5),
    FixedScheduler(keep=0),
    TableScheduler(rows={4: 2, 20: 5}),
    PyramidScheduler(keep=0.3),
    LatticeScheduler(stride=2, keep=0.3),
    LatticeScheduler(stride=2, offset=1, keep=0.3, size="fixed"),
    RankRatioScheduler(),
    RankRatioScheduler(rule="keep", scale=0.8, bias=1, energy=0.9, rope=False),
    RandomSampler(seed=3),
    UniformSampler(stride=2, offset=1),
    UnionSampler(stride=2),
    greedy.FacilityLocationSampler(weight_on="covered", similarity="shifted"),
    greedy.FacilityLocationSampler(weight_on="candidate", power=2.0),
    greedy.FacilityLocationSampler(weight_on="candidate", features="tower"),
    greedy.DeterminantSampler(kernel="quadratic"),
    greedy.SuppressSampler(threshold=0.1),
    greedy.SuppressSampler(threshold=1.5, relative=True, features="tower"),
    ClusterRecycler(reduce="sum", metric="cosine", distance_scale="none", plus_one=False, share=0.7, per_cluster=2),
    ClusterRecycler(per_cluster=3),
    BipartiteRecycler(share=0.4, add=False),
    BipartiteRecycler(share=0.4, features="keys", before_projector=True),
    ClassAttentionScorer(block="1/3"),
    *(AbsorbRecycler(neighbours=m, features=f, rest=r) for m, f, r in ((3, "keys", True), (2, "hidden", False))),
    OutliersScheduler(factor=0.5, times=3, at_least=2),
    TowerFirstSampler(signal="received_attention", share=0.1, neighbours=True),
    TowerFirstSampler(block="1/3", window=2),
    TowerFirstSampler(share=1.0, window=3, neighbours=True),
    BestFirstSampler(then="distinct", step=2),
    BestFirstSampler(then="distinct", features="tower", share=0.3),
    ChangeScorer(measure="cosine"),
    AffinityScorer(by="raters"),
    TemporalChangeScorer(run=4),
    OutlierScorer(centre="frame", measure="cosine", channels=1.0, norm=True),
    AboveReferenceScheduler(registers=2, factor=0.9, at_least=2),
    PivotSampler(vision=2, text=1),
    PivotSampler(vision=1, text=0),
    *(NearestRecycler(average=a, within=w) for a, w in (("mass", "frame"), ("blend", "place"), ("blend", "sample"))),
    NearestRecycler(window=3),
    NearestRecycler(rounds=2),
    TransportRecycler(temperature=0.5, rounds=3),
    NearestRecycler(average="mass", within="odd"),
    ImageGrouper(decay=0.5),
    FrameGrouper(by="score", temperature=0.1),
    StretchGrouper(parts=3, by="score", diversity=0.5),
    PrincipalGrouper(components=3, features="hidden"),
    FrameGrouper(by="curvature", temperature=0.7),
    FrameGrouper(whole=2),
    SceneGrouper(cuts=0, below=0.5),
]


def trained(part: Learned) -> Learned:
    """With other weights than training starts from, which may do nothing yet."""
    part.start(Host("", strategies.WIDTH, strategies.HEADS, 2), seed=0)
    draw = torch.Generator().manual_seed(1)
    for parameter in part.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return part


DEFAULTS = [
    trained(part()) if issubclass(part, Learned) else part()
    for role in registry.ROLES
    for part in registry.parts(role).values()
    if part.name() not in {"fixed", "table", "pyramid", "lattice", "solved", "mask"}
]
PARTS = [*DEFAULTS, *WITH_ARGUMENTS]
every_part = pytest.mark.parametrize("part", PARTS, ids=repr)


def run(part: Part, tokens: Tokens, counts: tuple[int, ...]) -> list[list[object]]:
    """What `part` makes of each sample: plain numbers, padding left off."""
    scores = torch.where(tokens.valid, tokens.hidden[..., 0].float(), -torch.inf)
    raters = tokens.question.valid.float() / tokens.question.valid.sum(1, keepdim=True).clamp(min=1)
    if part.role == "raters":
        out = part(tokens)
        assert out.dtype == torch.float32
        assert (out[~tokens.question.valid] == 0).all()
        return [[row[valid]] for row, valid in zip(out, tokens.question.valid, strict=True)]
    if part.role == "scorer":
        out = part(tokens, raters)
        assert out.dtype == torch.float32
        assert out[~tokens.valid].isneginf().all()
        return [[row[valid]] for row, valid in zip(out, tokens.valid, strict=True)]
    if part.role == "scheduler":
        out = part(tokens, scores, raters)
        assert isinstance(out, tuple) == part.static
        return [[int(n)] for n in out]
    kept = TopKSampler()(tokens, scores, counts)
    if part.role == "sampler":
        kept = part(tokens, scores, counts)
        assert kept.dtype == torch.int64
        assert kept.shape[1] == max(counts)
        return [[row[row >= 0]] for row in kept]
    if part.role == "grouper":
        groups = part(tokens)
        Contract("stage").groups(part, groups, tokens)
        Contract("stage").shares(part, part.share(groups, counts, scores), counts, groups.sizes)
        return [
            [row[valid], *sizes] for row, valid, sizes in zip(groups.index, tokens.valid, groups.sizes, strict=True)
        ]
    if part.role == "rectifier":
        out = part(tokens)
        assert out.dtype == torch.float32
        return [[row[valid]] for row, valid in zip(out, tokens.valid, strict=True)]
    new, anchors = recycled(part, tokens, kept, scores, counts)
    new.check()
    assert new.question is tokens.question
    names = ("hidden", "origin", "slot", "cell", "mass", "position")
    return [
        [*(getattr(new, n)[i, new.valid[i]] for n in names), anchors[i][anchors[i] >= 0]] for i in range(len(counts))
    ]


def equal(a: object, b: object, tolerance: float) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Sums of float32 that differ in their last bit may round to neighbouring numbers of a narrower type: one apart.
    apart = 1e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
    return torch.allclose(a, b, atol=tolerance, rtol=apart if tolerance else 0, equal_nan=True)


@every_part
@settings(max_examples=12)
@given(strategies.batches(), st.data(), st.booleans(), st.integers(0, 2), strategies.dtypes)
def test_a_row_of_a_batch_equals_the_sample_alone_and_padding_is_never_read(part, batch, data, left, extra, dtype):
    """Padding holds NaN: reading it anywhere would show."""
    counts = data.draw(strategies.counts_for(batch))
    together = run(part, strategies.collate(batch, left=left, extra=extra, dtype=dtype), counts)
    for i, sample in enumerate(batch):
        alone = run(part, strategies.collate([sample], dtype=dtype), counts[i : i + 1])
        assert all(equal(a, b, 1e-5) for a, b in zip(together[i], alone[0], strict=True))


@every_part
def test_it_is_deterministic_and_leaves_the_random_state_alone(part):
    tokens = strategies.collate(
        [strategies.sample((1, 5, 5)), strategies.sample((2, 2, 3), (1, 1, 2), seed=1, ties=True)]
    )
    before = torch.get_rng_state()
    first = run(part, tokens, (11, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = run(part, tokens, (11, 4))
    assert all(equal(a, b, 0) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert isinstance(part, Learned) or not list(part.parameters())


@every_part
def test_it_does_not_write_into_its_input(part):
    tokens = strategies.collate([strategies.sample((1, 4, 4)), strategies.sample((1, 2, 3), seed=1)], garbage=0.0)
    tensors = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    tensors = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    copies = {name: x.clone() for name, x in tensors.items()}
    run(part, tokens, (5, 2))
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@every_part
def test_repr_is_the_call_that_builds_it(part):
    assert eval(repr(part), {type(part).__name__: type(part)}).settings() == part.settings()


STATIC = [part for part in PARTS if getattr(part, "static", True) and part.role != "grouper"]
"""Parts that a graph may hold. A grouper reads on the host what an earlier stage has left; see test_groupers.py."""


every_graph = pytest.mark.parametrize(
    ("part", "counts"),
    [
        *(pytest.param(part, (9, 2), id=f"ragged-{part!r}") for part in STATIC),
        # Equal counts have a way of their own through parts that are given any.
        *(pytest.param(part, (6, 6), id=f"equal-{part!r}") for part in STATIC if part.role in ("sampler", "recycler")),
    ],
)


def tokens_for(counts):
    second = (1, 4, 4) if counts[0] == counts[1] else (1, 2, 3)
    return strategies.collate([strategies.sample((1, 4, 4)), strategies.sample(second, seed=1)], garbage=0.0)


def call_of(part, tokens, counts):
    """A call of the part that gives tensors alone."""
    raters = tokens.question.valid.float() / 4
    scores = torch.where(tokens.valid, tokens.hidden[..., 0], -torch.inf)
    kept = TopKSampler()(tokens, scores, counts)

    def call():
        if part.role == "raters":
            return part(tokens)
        if part.role == "scorer":
            return part(tokens, raters)
        if part.role == "scheduler":
            return part(tokens, scores, raters)
        if part.role == "sampler":
            return part(tokens, scores, counts)
        if part.role == "rectifier":
            return part(tokens)
        new, anchors = recycled(part, tokens, kept, scores, counts)
        return new.hidden, new.origin, new.mass, anchors

    return call


@every_graph
def test_it_never_waits_for_the_device(part, counts, monkeypatch):
    """Fake tensors hold no numbers: `.item()`, `.tolist()`, and an `if` or an index of booleans fail on them, as they
    would break a graph."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # functions of the tokens keep what they close over
    with FakeCopyMode(mode):
        part, tokens = copy.deepcopy(part), copy.deepcopy(tokens_for(counts))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # outside graphs a CPU may be asked
    with mode:
        call_of(part, tokens, counts)()


@pytest.mark.in_turn(5)
@every_graph
def test_it_compiles_to_one_graph(part, counts):
    call = call_of(part, tokens_for(counts), counts)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")()
    expected = call()
    pairs = zip(compiled, expected, strict=True) if isinstance(expected, tuple) else [(compiled, expected)]
    assert all(equal(a, b, 1e-6) for a, b in pairs)


def test_the_lists_above_hold_every_part():
    tried = {(part.role, part.name()) for part in PARTS}
    known = {(role, name) for role in registry.ROLES for name in registry.parts(role)}
    assert known - tried == {("scheduler", "solved")}  # it refuses to count
    assert {type(part) for part in PARTS} >= {DropRecycler, ClusterRecycler}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedScheduler(keep=1.5), r"scheduler 'fixed': keep=1.5 .* less than or equal to 1"),
        (lambda: FixedScheduler(keep=True), "keep=True should be a valid"),
        (lambda: FixedScheduler(keep="half"), "keep='half' should be a valid"),
        (lambda: LatticeScheduler(stride=2, keep=float("nan")), "keep=nan should be a finite number"),
        (lambda: FixedScheduler(keep=-1), "keep=-1 should be greater than or equal to 0"),
        (lambda: TableScheduler(rows={10: 20}), "row 10 keeps 20, more than there are"),
        (lambda: TableScheduler(rows={}), "at least 1 item"),
        (lambda: LatticeScheduler(stride=3, offset=3), "offset 3 must be less than the stride, 3"),
        (lambda: UniformSampler(offset=1), "offset 1 must be less than the stride, None"),
        (lambda: UnionSampler(stride=0), "stride=0 should be greater than or equal to 1"),
        (lambda: UnionSampler(stride=2, offset=2), "offset 2 must be less than the stride, 2"),
        (
            lambda: AttentionScorer(heads=0, layer="last"),
            r"layer='last' .*; heads=0 should be|heads=0 .*; layer='last'",
        ),
        (lambda: NormScorer(order="up"), "order='up' should be 'high' or 'low'"),
        (lambda: ClusterRecycler(share=0.0), "share=0.0 should be greater than 0"),
    ],
)
def test_bad_settings_are_refused_with_all_that_is_wrong(build, message):
    with pytest.raises(InputError, match=message):
        build()
