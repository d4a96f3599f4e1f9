"""Parts of methods before a decoder layer, of repair and of video, held against plain code of the formulas."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import plain_layers as plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.groups import share_by
from tokenprune.core.tokens import Tokens
from tokenprune.core.video import earlier_tokens, frame_numbers, videos
from tokenprune.parts.groupers.geometric import ImageGrouper
from tokenprune.parts.groupers.video import FrameGrouper, SceneGrouper
from tokenprune.parts.recyclers.nearest import NearestRecycler
from tokenprune.parts.samplers.pivot import PivotSampler
from tokenprune.parts.schedulers.reference import AboveReferenceScheduler
from tokenprune.parts.scorers.layers import AffinityScorer, ChangeScorer, GlobalQueryScorer, SpectralChangeScorer
from tokenprune.parts.scorers.prior import InformationScorer
from tokenprune.parts.scorers.video import OutlierScorer, TemporalChangeScorer

examples = settings(max_examples=15)
seeds = st.integers(0, 10_000)


def array(x: torch.Tensor) -> np.ndarray:
    return x[0].double().numpy()


@st.composite
def samples(draw: st.DrawFn) -> Tokens:
    """One picture of random numbers, without ties, and some text."""
    grid = (1, draw(st.integers(1, 5)), draw(st.integers(2, 5)))
    return strategies.collate([strategies.sample(grid, texts=draw(st.integers(2, 6)), seed=draw(seeds))])


@st.composite
def clips(draw: st.DrawFn) -> tuple[Tokens, int]:
    """A video, and its number of frames."""
    frames = draw(st.integers(1, 6))
    grid = (frames, draw(st.integers(1, 3)), draw(st.integers(2, 3)))
    return strategies.collate([strategies.sample(grid, seed=draw(seeds))]), frames


def text_weights(tokens: Tokens, *at: int) -> torch.Tensor:
    weights = torch.zeros(1, tokens.question.valid.shape[1])
    weights[0, list(at)] = 1 / len(at)
    return weights


def attention(tokens: Tokens, at: int) -> np.ndarray:
    return array(tokens.attention.scores(text_weights(tokens, at)).mean(1))


@examples
@given(samples())
def test_scorers_before_a_layer(tokens: Tokens) -> None:
    hidden, question = array(tokens.hidden), tokens.question
    last = question.valid.shape[1] - 1
    weights = text_weights(tokens, last)
    every = question.valid.float() / question.valid.sum()
    cases = (
        (ChangeScorer()(tokens), plain.change(array(tokens.signal("earlier_1")), hidden)),
        (InformationScorer()(tokens, weights), plain.information(attention(tokens, last), attention(tokens, 0))),
        (AffinityScorer()(tokens), plain.received(hidden, hidden)),
        (AffinityScorer(by="raters")(tokens, every), plain.received(array(question.states), hidden)),
        (
            GlobalQueryScorer()(tokens),
            plain.global_query(array(tokens.signal("layer_queries")), array(tokens.signal("layer_keys")), hidden),
        ),
        (
            SpectralChangeScorer(high=0.4)(tokens, weights),
            plain.spectral_change(array(tokens.signal("embedding")), hidden, attention(tokens, last), 0.4),
        ),
    )
    for got, expected in cases:
        assert np.allclose(array(got), expected, atol=1e-5)


def test_spectral_change_is_of_the_way_from_the_embedding() -> None:
    tokens = Tokens.from_hidden(
        torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(0)),
        text=torch.zeros(1, 1, 7),
        signals={"embedding": torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(1))},
        attention=strategies.collate([strategies.sample((1, 2, 3), texts=1)]).attention,
    )
    expected = plain.spectral_change(array(tokens.signal("embedding")), array(tokens.hidden), attention(tokens, 0))
    got = array(SpectralChangeScorer()(tokens, torch.ones(1, 1)))
    assert np.allclose(got, expected, atol=1e-6) and got.max() > 0


def test_the_prior_is_the_first_text_token_behind_the_last_image_and_no_rater() -> None:
    tokens = strategies.collate([strategies.sample((1, 2, 3), texts=3)])
    alone = InformationScorer()(tokens, text_weights(tokens, 0))  # the rater is that token: no prior
    p = attention(tokens, 0)
    p = p / p.sum()
    assert np.allclose(array(alone), p * (np.log(p + 1e-10) - np.log(1e-10)), atol=1e-6)
    slots = tokens.question.slot.clone()
    slots[0, 0] = 2  # now in front of the last vision token, as between two images
    between = replace(tokens, question=replace(tokens.question, slot=slots))
    got = array(InformationScorer()(between, text_weights(tokens, 2)))
    assert np.allclose(got, plain.information(attention(tokens, 2), attention(tokens, 1)), atol=1e-6)


@examples
@given(clips())
def test_scorers_of_videos(clip: tuple[Tokens, int]) -> None:
    tokens, frames = clip
    hidden = array(tokens.hidden)
    for run in (None, 4):
        got, expected = array(TemporalChangeScorer(run=run)(tokens)), plain.temporal_change(hidden, frames, run)
        assert all(4 <= a < 5 if b is None else abs(a - b) < 1e-5 for a, b in zip(got, expected, strict=True))
    assert np.allclose(array(OutlierScorer()(tokens)), plain.vidcom2(hidden, frames), atol=1e-5)
    vcast = OutlierScorer(centre="frame", measure="cosine", channels=1.0, norm=True)
    assert np.allclose(array(vcast(tokens)), plain.vcast(hidden, frames), atol=1e-5)


@examples
@given(clips(), st.data())
def test_budgets_of_frames(clip: tuple[Tokens, int], data: st.DataObject) -> None:
    tokens, frames = clip
    n = tokens.sizes[0]
    count, sizes = data.draw(st.integers(0, n)), [n // frames] * frames
    scores = OutlierScorer()(tokens)
    hidden = array(tokens.hidden)
    by_score, by_curve = FrameGrouper(by="score", temperature=0.1), FrameGrouper(by="curvature", temperature=0.7)
    for grouper, due in (
        (by_score, plain.vidcom2_budget(list(array(scores)), frames, 0.1)),
        (by_curve, plain.vcast_budget(hidden, frames, 0.7)),
        (FrameGrouper(whole=4), [1e6 if frame % 4 == 0 else 1.0 for frame in range(frames)]),
    ):
        groups = grouper(tokens)
        assert [list(s) for s in grouper.share(groups, (count,), scores)] == [plain.shares(count, sizes, due)]


@examples
@given(st.data())
def test_shares_are_exact_and_within_sizes(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=6))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 5.0]), min_size=len(sizes), max_size=len(sizes)))
    count = data.draw(st.integers(0, sum(sizes)))
    shares = share_by(count, sizes, weights)
    assert sum(shares) == count and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if sizes and sum(sizes) and len(set(weights)) == 1:
        assert shares == plain.shares(count, sizes, sizes) or weights[0] > 0
    served = [i for i, share in enumerate(shares) if share and not weights[i]]
    assert not served or all(shares[i] == sizes[i] for i in range(len(sizes)) if weights[i])


def test_newer_pictures_get_more() -> None:
    tokens = strategies.collate([strategies.sample((1, 4, 4), (1, 2, 4), (1, 4, 4))])
    groups = ImageGrouper(decay=0.5)(tokens)
    assert groups.weights == ((4.0, 4.0, 16.0),)
    assert ImageGrouper(decay=0.5).share(groups, (12,), tokens.mass) == ((2, 2, 8),)
    assert ImageGrouper(decay=0.5).share(groups, (30,), tokens.mass) == ((7, 7, 16),)  # the newest is full


@examples
@given(clips(), st.integers(0, 4), st.sampled_from([0.0, 0.2, 0.9]))
def test_scenes_are_cut_where_frames_differ(clip: tuple[Tokens, int], cuts: int, below: float) -> None:
    tokens, frames = clip
    groups = SceneGrouper(cuts=cuts, below=below)(tokens)
    each = tokens.sizes[0] // frames
    assert groups.index[0, ::each].tolist() == plain.scenes(array(tokens.hidden), frames, cuts, below)
    assert [prod(grid) for grid in groups.grids[0]] == list(groups.sizes[0])


@examples
@given(samples(), st.integers(1, 4), st.integers(0, 4), st.data())
def test_dart(tokens: Tokens, vision: int, words: int, data: st.DataObject) -> None:
    n = tokens.sizes[0]
    count, question = data.draw(st.integers(1, n)), tokens.question
    kept = PivotSampler(vision=vision, text=words)(tokens, tokens.mass, count)[0].tolist()
    keys = array(tokens.signal("layer_keys").flatten(2))
    spoken = array(question.keys.flatten(2))
    expected = plain.dart(keys, array(tokens.hidden), spoken, array(question.states), count, min(vision, n), words)
    assert kept == expected


@examples
@given(clips(), st.sampled_from(["mean", "mass", "blend"]), st.sampled_from(["sample", "frame", "place"]), st.data())
def test_nearest_survivors_take_in_what_is_dropped(clip, average: str, within: str, data: st.DataObject) -> None:
    tokens, frames = clip
    n = tokens.sizes[0]
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    mass = torch.randint(1, 5, (1, n), generator=torch.Generator().manual_seed(0)).float()
    tokens = replace(tokens, mass=mass)
    each = n // frames
    may = [
        [
            within == "sample"
            or (within == "frame" and i // each == k // each)
            or (within == "place" and k == max([j for j in kept if j % each == i % each and j < i], default=-1))
            for k in range(n)
        ]
        for i in range(n)
    ]
    part = NearestRecycler(average=average, within=within, own=0.6)
    left = part.recycle(tokens, torch.tensor([kept]), tokens.mass, len(kept))
    expected = plain.nearest(array(tokens.hidden), kept, average, mass[0].tolist(), may, 0.6)
    assert np.allclose(array(left.hidden), [expected[k] for k in kept], atol=1e-5)
    lost = [i for i in range(n) if i not in kept and not any(may[i][k] for k in kept)]
    assert left.mass.sum() == mass.sum() - mass[0, lost].sum()


@examples
@given(samples(), st.integers(1, 4), st.sampled_from([0.5, 1.0]))
def test_counts_above_a_reference(tokens: Tokens, registers: int, factor: float) -> None:
    scores = AffinityScorer()(tokens)
    got = AboveReferenceScheduler(registers=registers, factor=factor)(tokens, scores)
    assert got.tolist() == [plain.above_reference(array(scores), array(tokens.hidden), registers, factor)]


def test_pictures_of_one_size_in_a_row_are_a_video() -> None:
    grids = ((1, 1, 2), (1, 1, 2), (2, 2, 1), (1, 1, 2))
    assert [tuple(video) for video in videos(grids)] == [(2, 1, 2), (2, 2, 1), (1, 1, 2)]
    assert earlier_tokens(grids) == (-1, -1, 0, 1, -1, -1, 4, 5, -1, -1)
    place, frame = frame_numbers(grids)
    assert place == (0, 1, 0, 1, 2, 3, 2, 3, 4, 5) and frame == (0, 0, 1, 1, 0, 0, 1, 1, 0, 0)


@pytest.mark.parametrize("run", [None, 4])
def test_a_frame_whose_predecessor_is_gone_counts_as_new(run: int | None) -> None:
    sample = strategies.sample((2, 1, 3), alive=(0, 3, 4, 5))
    scores = TemporalChangeScorer(run=run)(strategies.collate([sample]))[0]
    assert (scores[[0, 2, 3]] >= 4).all() and scores[1] <= 2
