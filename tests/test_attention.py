"""Rater attention against full softmax attention in plain Python, and the invariants of the papers' scorers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.attention import GRAVITY_FLOOR, Projection, RaterAttention, attention_from_qk
from tokenprune.errors import InputError

BEFORE, VISION, TEXT = 3, 7, 4
LENGTH = BEFORE + VISION + TEXT
COLUMNS = range(BEFORE, BEFORE + VISION)


def random_qk(seed=0, heads=4, key_heads=2, width=8, batch=1, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads, length, width, generator=generator)
    return q, torch.randn(batch, key_heads, length, width, generator=generator)


def attention(q, k, **more):
    vision = torch.arange(BEFORE, BEFORE + VISION)
    text = torch.arange(BEFORE + VISION, q.shape[2])
    return attention_from_qk(q, k, vision=vision, text=text, **more)


def full(q, k, **more):
    return plain.eager_attention(q[0].double().numpy(), k[0].double().numpy(), **more)


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.sampled_from([None, 5.0]))
def test_equals_full_softmax_attention(seed, heads, softcap):
    q, k = random_qk(seed, *heads)
    raters = torch.rand(1, TEXT, generator=torch.Generator().manual_seed(seed))
    raters = raters / raters.sum()
    expected = full(q, k, softcap=softcap)[:, BEFORE + VISION :, BEFORE : BEFORE + VISION]
    ours = attention(q, k, softcap=softcap)
    weighted = np.einsum("hij,i->hj", expected, raters[0].double().numpy())
    np.testing.assert_allclose(ours.scores(raters)[0].numpy(), weighted, atol=1e-5)
    np.testing.assert_allclose(ours.matrix(raters)[0].numpy(), expected.mean(0), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("normalise", ["all", "vision"])
def test_blocks_of_any_size_give_the_same(rows, normalise):
    q, k = random_qk()
    raters = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    whole = attention(q, k)
    kernel = lambda layer: (torch.rand(1, 1, TEXT, 8) + 1, torch.rand(1, 1, LENGTH, 8) + 1)  # noqa: E731
    small = RaterAttention(
        project=whole.project,
        columns=whole.columns,
        columns_valid=whole.columns_valid,
        block_bytes=rows * 4 * 4 * LENGTH,
    )
    blocks = [block for _, block, _ in small._blocks(small.project("previous", True, None), normalise)]
    assert [block.shape[2] for block in blocks] == [min(rows, TEXT - i) for i in range(0, TEXT, rows)]
    assert torch.allclose(small.scores(raters, normalise=normalise), whole.scores(raters, normalise=normalise))
    assert torch.allclose(small.matrix(raters, normalise=normalise), whole.matrix(raters, normalise=normalise))
    torch.manual_seed(0)
    heavy = RaterAttention(
        project=whole.project, columns=whole.columns, columns_valid=whole.columns_valid, kernel=kernel
    ).scores(raters, normalise=normalise, gravity=True)
    torch.manual_seed(0)
    blocked = RaterAttention(
        project=whole.project,
        columns=whole.columns,
        columns_valid=whole.columns_valid,
        kernel=kernel,
        block_bytes=small.block_bytes,
    ).scores(raters, normalise=normalise, gravity=True)
    assert torch.allclose(heavy, blocked)


@settings(max_examples=25)
@given(strategies.batches(least=1, texts=1), st.booleans(), st.integers(0, 3), st.sampled_from(["all", "vision"]))
def test_a_row_of_a_padded_batch_equals_the_sample_alone(batch, left, extra, normalise):
    tokens = strategies.collate(batch, left=left, extra=extra)
    raters = tokens.question.valid.float() / tokens.question.valid.sum(1, keepdim=True)
    scores = tokens.attention.scores(raters, normalise=normalise, rope=False)
    matrix = tokens.attention.matrix(raters, normalise=normalise)
    for i, sample in enumerate(batch):
        alone = strategies.collate([sample])
        equal = torch.full((1, len(sample.text)), 1 / len(sample.text))
        n = len(sample.alive)
        expected = alone.attention.scores(equal, normalise=normalise, rope=False)
        assert torch.allclose(scores[i, :, :n], expected[0], atol=1e-6)
        assert (scores[i, :, n:] == 0).all()
        expected = alone.attention.matrix(equal, normalise=normalise)
        assert torch.allclose(matrix[i, tokens.question.valid[i], :n], expected[0], atol=1e-6)
        assert (matrix[i, ~tokens.question.valid[i]] == 0).all()
        assert (matrix[i, :, n:] == 0).all()


@pytest.mark.parametrize("normalise", ["all", "vision"])
def test_rows_that_see_nothing_or_do_not_rate_are_zero_and_never_nan(normalise):
    q, k = random_qk()
    visible = torch.ones(1, 1, TEXT, LENGTH, dtype=torch.bool)
    visible[:, :, 0] = False  # sees nothing
    q[:, :, -1] = torch.nan  # rates nothing
    source = Projection(q=q[:, :, -TEXT:], k=k, scaling=1.0, visible=visible)
    ours = RaterAttention(
        project=lambda layer, rope, rows: source,
        columns=torch.arange(BEFORE, BEFORE + VISION)[None],
        columns_valid=torch.ones(1, VISION, dtype=torch.bool),
    )
    raters = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    scores, matrix = ours.scores(raters, normalise=normalise), ours.matrix(raters, normalise=normalise)
    assert scores.isfinite().all()
    assert matrix.isfinite().all()
    assert (matrix[:, [0, 3]] == 0).all()
    assert (matrix[:, [1, 2]] > 0).all()
    assert scores.sum(2).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_masks_hide_like_bool_masks_and_may_add_a_bias(dtype):
    q, k = random_qk(batch=2)
    columns = torch.arange(BEFORE, BEFORE + VISION).expand(2, -1)
    visible = torch.rand(2, 1, TEXT, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[1, :, 2] = False
    additive = torch.zeros(2, 1, TEXT, LENGTH, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    raters = torch.full((2, TEXT), 1 / TEXT)

    def ours(mask, normalise):
        source = Projection(q=q[:, :, -TEXT:], k=k, scaling=0.3, visible=mask)
        valid = torch.ones(2, VISION, dtype=torch.bool)
        rater_attention = RaterAttention(project=lambda *_: source, columns=columns, columns_valid=valid)
        return rater_attention.scores(raters, normalise=normalise)

    for normalise in ("all", "vision"):
        expected = ours(visible, normalise)
        assert torch.allclose(ours(additive, normalise), expected, atol=1e-6)
        assert torch.allclose(ours(additive * 0.75, normalise), expected, atol=1e-6)
        assert torch.allclose(ours(additive.float().masked_fill(~visible, -torch.inf), normalise), expected)
        assert not torch.allclose(ours(additive + visible.to(dtype) * torch.arange(LENGTH), normalise), expected)


@settings(max_examples=25)
@given(st.integers(0, 999))
def test_invariants_of_the_papers(seed):
    """SparseVLM spec 8.3 and FEATHER spec 5: sums, one rater, linearity, duplicates, heads, other queries."""
    q, k = random_qk(seed)
    ours = attention(q, k)
    raters = torch.rand(1, TEXT, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    scores, inside = ours.scores(raters), ours.scores(raters, normalise="vision")
    assert (scores >= 0).all()
    assert (scores.sum(-1) <= 1 + 1e-6).all()
    assert torch.allclose(inside.sum(-1), torch.ones(1, 4))
    one = torch.eye(TEXT)
    rows = torch.stack([ours.scores(one[i : i + 1]) for i in range(TEXT)])
    assert torch.allclose(rows.mean(2)[:, 0], ours.matrix(raters)[0], atol=1e-6)
    assert torch.allclose((rows * raters[0, :, None, None, None]).sum(0), scores, atol=1e-6)  # linear in the weights
    changed = q.clone()
    changed[:, :, :-1] += 1  # the last text token rates alone: other queries are of no concern
    assert torch.equal(attention(changed, k).scores(one[-1:]), ours.scores(one[-1:]))
    single = q[:, :1], k[:, :1]
    both = [attention(*single).scores(one[-1:], normalise=normalise)[0, 0] for normalise in ("all", "vision")]
    assert both[0].argsort().tolist() == both[1].argsort().tolist()  # with one head the domain of softmax is all one


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 500))
def test_rope_depends_on_distance_and_no_rope_on_no_position(seed, shift):
    q, k = (x[0].double().numpy() for x in random_qk(seed))
    raters = torch.full((1, TEXT), 1 / TEXT)

    def ours(positions, rope):
        turned = (torch.tensor(plain.rotate(x, positions))[None] for x in (q, k))
        plain_qk = torch.tensor(q)[None], torch.tensor(k)[None]
        return attention(*turned, before_rope=plain_qk).scores(raters, rope=rope)

    here, there = range(LENGTH), range(shift, shift + LENGTH)
    assert torch.allclose(ours(here, True), ours(there, True), atol=1e-5)
    assert torch.equal(ours(here, False), ours(there, False))
    assert not torch.allclose(ours(here, True), ours(here, False), atol=1e-3)


@pytest.mark.parametrize(
    ("width", "golden"),
    [
        (128, {1: 0.970, 20: 0.608, 80: 0.452, 300: 0.307, 750: 0.171}),
        (32, {50: 0.369, 80: 0.490, 150: 0.206, 300: 0.250}),
    ],
)
def test_identical_keys_score_by_rotary_distance_alone(width, golden):
    """The position bias, as a unit test: golden mean cosines over the rotary frequencies (base 10000)."""
    distances = sorted(golden, reverse=True)
    last = distances[0]
    ones = np.ones((1, len(distances) + 1, width))
    turned = torch.tensor(plain.rotate(ones, [last - d for d in distances] + [last]))[None]
    flat = torch.tensor(ones)[None]
    ours = attention_from_qk(
        turned,
        turned,
        vision=torch.arange(len(distances)),
        text=torch.tensor([len(distances)]),
        before_rope=(flat, flat),
        scaling=1 / width,
    )
    rater = torch.ones(1, 1)
    biased = ours.scores(rater, normalise="vision")[0, 0].log()
    for i, distance in enumerate(distances):
        expected = golden[distance] - golden[last]
        assert (biased[i] - biased[0]).item() == pytest.approx(expected, abs=1.1e-3), distance
    assert torch.allclose(ours.scores(rater, rope=False, normalise="vision"), torch.tensor(1 / len(distances)))


def gravity_attention(positions, last, width=128):
    """One text token at `last` that sees vision tokens at `positions`, all logits equal, with Llama's kernel."""
    ones = np.ones((1, len(positions) + 1, width))
    turned = torch.tensor(plain.rotate(ones, [*positions, last]))[None]
    flat = torch.zeros(1, 1, len(positions) + 1, width)
    base = attention_from_qk(flat, flat, vision=torch.arange(len(positions)), text=torch.tensor([len(positions)]))
    return RaterAttention(
        project=base.project,
        columns=base.columns,
        columns_valid=base.columns_valid,
        kernel=lambda layer: (turned[:, :, -1:], turned),
    )


def test_gravity_divides_by_the_kernel_and_never_by_almost_nothing():
    """Llama: G(0) = 11.3, G(100) = 5.4, G(611) = 2.9; the kernel turns negative at 1707, so it is bounded."""
    rater = torch.ones(1, 1)
    distances = [1707, 611, 100, 0]
    ours = gravity_attention([2000 - d for d in distances], 2000)
    pull = ours.scores(rater)[0, 0] / ours.scores(rater, gravity=True)[0, 0]
    assert pull.tolist() == pytest.approx([GRAVITY_FLOOR * 128**0.5, 2.9, 5.4, 11.3], abs=0.06)
    near = gravity_attention(range(700), 699)
    pull = near.scores(rater)[0, 0] / near.scores(rater, gravity=True)[0, 0]
    assert pull.min().item() == pytest.approx(1.19, abs=0.01)  # published range: the bound is not touched


def test_errors_say_what_is_missing():
    q, k = random_qk()
    raters = torch.full((1, TEXT), 1 / TEXT)
    with pytest.raises(InputError, match=r"before_rope=\(q, k\)"):
        attention(q, k).scores(raters, rope=False)
    with pytest.raises(InputError, match="next layer was asked for, but q and k are of the previous one"):
        attention(q, k).scores(raters, layer="next")
    with pytest.raises(InputError, match="give `kernel`"):
        attention(q, k).scores(raters, gravity=True)
    with pytest.raises(InputError, match=r"4 text tokens of 1 samples, rater weights are \(1, 3\)"):
        attention(q, k).matrix(raters[:, :3])
    with pytest.raises(InputError, match="4 query heads cannot share 3 key heads evenly"):
        attention(q, k[:, :1].expand(-1, 3, -1, -1)).scores(raters)
    with pytest.raises(InputError, match=r"got \(1, 4, 14, 8\) and \(1, 2, 13, 8\)"):
        attention(q, k[:, :, 1:])


def test_no_text_means_no_scores():
    q, k = random_qk(length=BEFORE + VISION)
    nobody = torch.zeros(1, 0)
    assert attention(q, k).scores(nobody).tolist() == torch.zeros(1, 4, VISION).tolist()
    assert attention(q, k).matrix(nobody).shape == (1, 0, VISION)


@settings(max_examples=25)
@given(strategies.batches(least=1, texts=1), st.sampled_from(["all", "vision"]), st.booleans())
def test_a_bound_on_the_raters_changes_nothing_but_the_rows_computed(batch, normalise, left):
    tokens = strategies.collate(batch, left=left, extra=1)
    texts = tokens.question.valid.shape[1]
    last = tokens.question.valid & (tokens.question.valid.flip(1).cumsum(1).flip(1) == 1)
    kernel = lambda layer: (  # noqa: E731
        1 + torch.arange(texts)[None, None, :, None].expand(len(batch), 1, -1, 4) / texts,
        torch.ones(len(batch), 1, tokens.valid.shape[1] + texts, 4),
    )
    free = replace(tokens.attention, kernel=kernel)
    asked = []

    def project(layer, rope, rows):
        source = free.project(layer, rope, rows)
        asked.append(source.q.shape[2])
        return source

    bound = replace(free, project=project, most=1)
    for gravity in (False, True):
        expected = free.scores(last.float(), normalise=normalise, gravity=gravity)
        assert torch.allclose(bound.scores(last.float(), normalise=normalise, gravity=gravity), expected, atol=1e-6)
    assert torch.allclose(
        bound.matrix(last.float(), normalise=normalise), free.matrix(last.float(), normalise=normalise), atol=1e-6
    )
    assert set(asked) == {1}


@pytest.mark.parametrize("normalise", ["all", "vision"])
@pytest.mark.parametrize("text", [range(BEFORE), (0, LENGTH - 1), range(BEFORE + VISION, LENGTH)])
def test_attention_both_ways_is_the_full_softmax(normalise, text):
    """In a layer that is not causal, text before the image has seen it, too; padding stays hidden."""
    q, k = random_qk(batch=2)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 1] = False
    places = torch.tensor(text)
    raters = torch.full((2, len(places)), 1 / len(places))
    vision = torch.arange(BEFORE, BEFORE + VISION)
    ours = attention_from_qk(q, k, vision=vision, text=places, valid=valid, causal=False)
    logits = q @ k.repeat_interleave(2, dim=1).mT / 8**0.5
    domain = valid if normalise == "all" else torch.zeros_like(valid).index_fill(1, vision, True)
    full = logits.masked_fill(~domain[:, None, None, :], -torch.inf).softmax(-1)
    expected = full[:, :, places][..., vision]
    assert torch.allclose(ours.scores(raters, normalise=normalise), expected.mean(2), atol=1e-6)
    assert torch.allclose(ours.matrix(raters, normalise=normalise), expected.mean(1), atol=1e-6)


def test_a_rater_that_sees_no_vision_token_is_refused():
    q, k = random_qk(batch=2)
    vision, text = torch.arange(BEFORE, BEFORE + VISION), torch.tensor([[LENGTH - 1, -1], [BEFORE, BEFORE - 1]])
    message = r"text token at 2 of sample 1 sees no vision token \(the first stands at 3\).*pass causal=False"
    with pytest.raises(InputError, match=message):
        attention_from_qk(q, k, vision=vision, text=text)
    attention_from_qk(q, k, vision=vision, text=text, causal=False)
    attention_from_qk(q, k, vision=vision, text=text.masked_fill(text == BEFORE - 1, -1))  # it sees one
    nothing = torch.full((2, VISION), -1)
    attention_from_qk(q, k, vision=nothing, text=text)  # no vision tokens, nothing to see
    hidden = torch.ones(2, LENGTH, dtype=torch.bool)
    hidden[0, BEFORE : BEFORE + VISION] = False
    with pytest.raises(InputError, match="text token at 13 of sample 0 sees no vision token"):
        attention_from_qk(q, k, vision=vision, text=text, valid=hidden, causal=False)


@pytest.mark.parametrize("gravity", [False, True])
def test_heads_of_several_processes_come_together(gravity):
    """Each has two of four heads, and gathers what the other computes; either gives what one process gives."""
    q, k = random_qk()
    kernel = None
    if gravity:
        generator = torch.Generator().manual_seed(1)
        ones = torch.rand(1, 1, LENGTH, 8, generator=generator) + 1
        kernel = lambda layer: (ones[:, :, -TEXT:], ones)  # noqa: E731
    whole = replace(attention(q, k), kernel=kernel)
    parts = [
        replace(attention(q[:, rows], k[:, key]), kernel=kernel) for rows, key in ((slice(2), [0]), (slice(2, 4), [1]))
    ]
    raters = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    own = {}

    def exchange(mine, layer, x):
        own[mine] = x
        return torch.cat([own[0], own[1]], dim=1) if len(own) == 2 else x

    for ask in (lambda a: a.scores(raters, gravity=gravity), lambda a: a.matrix(raters)):
        own.clear()
        for number, part in enumerate(parts):
            given = ask(replace(part, gather=lambda layer, x, number=number: exchange(number, layer, x)))
        assert torch.allclose(given, ask(whole), atol=1e-6)
        assert given.shape == ask(whole).shape
