"""What is special about single learned parts: where training starts, what they cost, what they may not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune.core.gates import batch_threshold
from tokenprune.core.merge import merged_mass
from tokenprune.errors import InputError, RecipeError
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.soft import SoftStage
from tokenprune.parts.learned import Host
from tokenprune.parts.recyclers.abstraction import AbstractionRecycler
from tokenprune.parts.recyclers.convolution import ConvolutionRecycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.recyclers.fusion import FusionRecycler, scan
from tokenprune.parts.recyclers.pool import PoolRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.samplers.even import UniformSampler
from tokenprune.parts.schedulers.threshold import ThresholdScheduler
from tokenprune.parts.scorers.dual_expert import DualExpertScorer
from tokenprune.parts.scorers.mask import MaskScorer
from tokenprune.parts.scorers.region_router import RegionRouterScorer
from tokenprune.parts.scorers.trimmer import TrimmerScorer
from tokenprune.parts.work import Work
from tokenprune.recipe import load_recipe
from tokenprune.stage import Stage

WIDTH = 8
HOST = Host("", WIDTH, 2)


def tokens(rows: int = 6, columns: int = 6, batch: int = 2, seed: int = 0) -> tp.Tokens:
    draw = torch.Generator().manual_seed(seed)
    return tp.Tokens.from_hidden(
        torch.randn(batch, rows * columns, WIDTH, generator=draw),
        grid=(rows, columns),
        text=torch.randn(batch, 3, WIDTH, generator=draw),
    )


def shaken(part: Any, seed: int = 1) -> Any:
    """A part with other weights than training starts from."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw)
    return part


@pytest.mark.parametrize(
    ("part", "baseline", "sampler"),
    [
        (ConvolutionRecycler(dim=4), PoolRecycler(), UniformSampler()),
        (AbstractionRecycler(dim=4), DropRecycler(), TopKSampler()),
        (FusionRecycler(dim=4), DropRecycler(), TopKSampler()),
    ],
    ids=["convolution is pool", "abstraction is drop", "fusion is drop"],
)
@pytest.mark.parametrize("keep", [4, 9, 17])
def test_training_starts_exactly_at_the_baseline(part: Any, baseline: Any, sampler: Any, keep: int) -> None:
    given = tokens()
    scores = given.hidden[..., 0]
    kept = sampler(given, scores, (keep, keep))
    expected = baseline.recycle(given, kept, scores, keep)
    part.start(HOST, seed=0)
    assert torch.equal(part.recycle(given, kept, scores, keep).hidden, expected.hidden)
    assert not torch.allclose(shaken(part).recycle(given, kept, scores, keep).hidden, expected.hidden, atol=1e-3)


def test_a_convolution_tells_where_in_its_block_something_was_and_an_average_does_not() -> None:
    given = tokens(2, 2, batch=1)
    turned = replace(given, hidden=given.hidden.flip(1))
    kept, scores = torch.tensor([[3]]), torch.zeros(1, 4)
    pooled = [PoolRecycler().recycle(each, kept, scores, 1).hidden for each in (given, turned)]
    assert torch.allclose(*pooled, atol=1e-6)
    part = shaken(ConvolutionRecycler(dim=4).start(HOST, seed=0))
    made = [part.recycle(each, kept, scores, 1).hidden for each in (given, turned)]
    assert (made[0] - made[1]).abs().max() > 1e-2


def test_a_convolution_is_that_of_pytorch() -> None:
    """Blocks of two by two: pointwise, depthwise with stride 2, pointwise, beside average pooling."""
    given = tokens(6, 4)
    part = shaken(ConvolutionRecycler(dim=4).start(HOST, seed=0))
    kept = torch.tensor([row * 4 + column for row in (1, 3, 5) for column in (1, 3)]).expand(2, 6)
    made = part.recycle(given, kept, torch.zeros(2, 24), 6).hidden
    picture = given.hidden.mT.reshape(2, WIDTH, 6, 4)
    channels = part.narrow(part.norm(picture.movedim(1, -1))).movedim(-1, 1)
    kernel = part.kernel.T.reshape(4, 1, 3, 3)[..., :2, :2]  # survivors are the last of their blocks
    found = torch.nn.functional.conv2d(channels, kernel, stride=2, groups=4) / 4
    pooled = torch.nn.functional.avg_pool2d(picture, 2).movedim(1, -1)
    expected = pooled + part.expand(torch.nn.functional.gelu(found.movedim(1, -1)))
    assert torch.allclose(made, expected.flatten(1, 2), atol=1e-5)


def test_abstraction_does_not_depend_on_the_order_of_what_is_dropped_and_loses_no_mass() -> None:
    given = tokens(3, 3, batch=1)
    part = shaken(AbstractionRecycler(dim=4).start(HOST, seed=0))
    kept, scores = torch.tensor([[0, 4]]), torch.zeros(1, 9)
    order = torch.tensor([0, 8, 3, 7, 4, 5, 6, 2, 1])
    mixed = replace(given, hidden=given.hidden[:, order])
    assert torch.allclose(
        part.recycle(given, kept, scores, 2).hidden, part.recycle(mixed, kept, scores, 2).hidden, atol=1e-6
    )
    plan = part(given, kept, scores, 2)
    assert plan is not None
    assert merged_mass(given.mass, plan).sum().item() == pytest.approx(9.0, rel=1e-5)


def test_abstraction_asks_for_the_question_or_does_not() -> None:
    one, other = tokens(seed=0), tokens(seed=0)
    other = replace(other, question=tokens(seed=5).question)
    kept, scores = torch.tensor([[0, 4]]).expand(2, 2), torch.zeros(2, 36)
    for reads in (True, False):
        part = shaken(AbstractionRecycler(dim=4, question=reads).start(HOST, seed=0))
        apart = part.recycle(one, kept, scores, 2).hidden - part.recycle(other, kept, scores, 2).hidden
        assert bool(apart.abs().max() > 1e-3) is reads


@pytest.mark.parametrize(
    "part",
    [ConvolutionRecycler(dim=4), AbstractionRecycler(dim=4), FusionRecycler(dim=4)],
    ids=lambda part: str(part.title),
)
def test_a_sample_that_loses_nothing_stays_as_it_is(part: Any) -> None:
    given = tokens()
    shaken(part.start(HOST, seed=0))
    kept = torch.full((2, 36), -1)
    kept[0], kept[1, :9] = torch.arange(36), torch.arange(0, 36, 4)
    made = part.recycle(given, kept, torch.zeros(2, 36), (36, 9))
    assert torch.equal(made.hidden[0], given.hidden[0])
    assert not torch.allclose(made.hidden[1, :9], given.hidden[1, kept[1, :9]], atol=1e-3)


WORK = Work(tokens=40, kept=10, total=40, text=6, raters=1, sequence=50, width=WIDTH, heads=2, kv_heads=2, head_dim=4)


def test_costs_are_those_of_the_formulas() -> None:
    assert ConvolutionRecycler(dim=4).multiply_adds(WORK) == 40 * 10 * (3 + 8) + 4 * 8 * (40 + 10) + 40 * 10 * 4
    projected = (2 * 40 + 2 * 10 + 1) * 8
    assert AbstractionRecycler(dim=4).multiply_adds(WORK) == 4 * (projected + 2 * 10 * 40) + 10 * 40
    assert FusionRecycler(dim=4).multiply_adds(WORK) == 4 * 8 * (40 + 6 + 10) + 4 * 4 * 4 * (40 + 6)
    assert TrimmerScorer(dim=4).multiply_adds(WORK) == 4 * 8 * (40 + 2) + 40 * (16 * 4 + 4 * 2)
    assert RegionRouterScorer(dim=4).multiply_adds(WORK) == 40 * (4 * 8 + 8 * 4 + 4 * 2)
    assert DualExpertScorer().multiply_adds(WORK) == 40 * 8 * (1 + 6)


def test_counts_by_a_bar_are_the_samples_own() -> None:
    given = tokens(2, 2, batch=3)
    scores = torch.tensor([[1.0, 2.0, -1.0, 0.0], [-1.0, -2.0, -3.0, -4.0], [1.0, 1.0, 1.0, 1.0]])
    assert ThresholdScheduler()(given, scores).tolist() == [2, 1, 4]
    assert ThresholdScheduler(above=1.5, at_least=2)(given, scores).tolist() == [2, 2, 2]
    assert ThresholdScheduler(at_most=0.75)(given, scores).tolist() == [2, 1, 3]
    assert ThresholdScheduler(expected=0.5).nominal(4, total=4, grids=()) == 2.0


def test_the_bar_of_a_batch_is_where_the_share_is_met() -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    scores[2, 20:] = -torch.inf
    middle = batch_threshold(scores, 0.25)
    assert int((scores > middle).sum()) == 25
    assert batch_threshold(scores, 1.0) == scores[scores.isfinite()].min()


def soft(stage: Stage, count: int, seed: int = 0) -> SoftStage:
    return SoftStage(stage, lambda size: count, torch.Generator().manual_seed(seed))


def test_in_training_a_recycler_writes_what_it_writes_when_tokens_go() -> None:
    """With scores far apart noise changes nothing: open rows of the soft stage are the hard stage's survivors."""
    given = tokens()
    (stage,) = fresh_stages(load_recipe("bus"), HOST)
    shaken(stage.recycler)
    for parameter in stage.scorer.parameters():
        parameter.data *= 1000.0
    hard = stage(given, (9, 9))
    result = soft(stage, 9)(given)
    assert result.written is not None
    assert result.tokens.bias is not None
    opened = result.tokens.bias > -1
    assert opened.sum(1).tolist() == [9, 9]
    assert torch.equal(result.tokens.origin[opened].view(2, 9), hard.tokens.origin)
    assert torch.allclose(result.tokens.hidden[opened].view(2, 9, WIDTH), hard.tokens.hidden, atol=1e-5)
    assert torch.allclose(result.tokens.mass[opened].view(2, 9), hard.tokens.mass, atol=1e-5)
    assert torch.equal(result.tokens.hidden[~opened], given.hidden[~opened])


def test_gates_with_a_bar_meet_the_share_over_the_batch_and_tell_how_far_it_is() -> None:
    given = tokens(8, 8, batch=4)
    (stage,) = fresh_stages(load_recipe("text-conditioned"), HOST)
    stage.scheduler = ThresholdScheduler(expected=0.25, above=0.5)
    stage.requires_grad_(True)
    each = []
    for seed in range(60):
        result = (trial := soft(stage, 1, seed))(given)
        assert result.tokens.bias is not None
        each.append((result.tokens.bias > -1).sum(1))
    opened = torch.stack(each).float()
    assert bool((opened >= 1).all())
    assert trial.off is not None
    assert result.scores is not None
    assert trial.off.item() == pytest.approx((batch_threshold(result.scores, 0.25) - 0.5).square().item())
    trial.off.backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in stage.scorer.parameters() if p.grad is not None)


def test_what_an_earlier_gate_has_closed_stays_closed() -> None:
    given = tokens()
    (stage,) = fresh_stages(load_recipe("text-conditioned"), HOST)
    first = soft(stage, 12)(given).tokens
    assert first.bias is not None
    second = soft(stage, 20, seed=1)(first).tokens
    assert second.bias is not None
    assert torch.equal(second.bias > -1, first.bias > -1)
    third = soft(stage, 5, seed=2)(first).tokens
    assert third.bias is not None
    assert bool(((third.bias > -1) <= (first.bias > -1)).all())
    assert (third.bias > -1).sum(1).tolist() == [5, 5]


def test_a_rectifier_cannot_be_fitted_beside_gates() -> None:
    from tokenprune.parts.rectifiers.mass import LogMassRectifier

    with pytest.raises(RecipeError, match="rectifier 'log_mass' adds to attention"):
        soft(Stage(place="after_vision", rectifier=LogMassRectifier()), 3)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
def test_a_scan_is_the_loop(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    a, b = torch.rand(2, length, 3, generator=draw), torch.randn(2, length, 3, generator=draw)
    state, expected = torch.zeros(2, 3), []
    for step in range(length):
        state = a[:, step] * state + b[:, step]
        expected.append(state)
    assert torch.allclose(scan(a, b), torch.stack(expected, 1), atol=1e-5)


def test_fusion_brings_every_token_to_every_survivor_and_the_question_too() -> None:
    given = tokens(5, 5, batch=1)
    hidden, words = given.hidden.requires_grad_(), given.question.embeddings.requires_grad_()
    part = shaken(FusionRecycler(dim=4).start(HOST, seed=0))
    part.recycle(given, torch.tensor([[12]]), torch.zeros(1, 25), 1).hidden[0, 0].square().sum().backward()
    assert hidden.grad is not None
    assert words.grad is not None
    assert bool((hidden.grad.abs().sum(-1) > 0).all())
    assert bool((words.grad.abs().sum(-1) > 0).all())


def test_the_window_of_fusion_is_a_depthwise_convolution_on_each_picture() -> None:
    given = tokens(4, 5)
    part = shaken(FusionRecycler(dim=4, reach=1).start(HOST, seed=0))
    picture = part.narrow(part.norm(given.hidden)).mT.reshape(2, 4, 4, 5)
    expected = torch.nn.functional.conv2d(picture, part.kernel.T.reshape(4, 1, 3, 3), padding=1, groups=4)
    assert torch.allclose(part._local(given), expected.flatten(2).mT, atol=1e-5)


def test_two_experts_each_decide_alone_where_they_have_all_the_weight() -> None:
    given = tokens()
    whole = given.hidden.mean(1, keepdim=True)
    visual = torch.cosine_similarity(given.hidden, whole, dim=-1)
    native = torch.cosine_similarity(given.hidden.unsqueeze(2), given.question.embeddings.unsqueeze(1), dim=-1).amax(-1)
    for norm in ("rank", "minmax", "softmax"):
        for weight, alone in ((1.0, visual), (0.0, native)):
            score = DualExpertScorer(weight=weight, norm=norm)(given)  # type: ignore[arg-type]
            assert torch.equal(score.argsort(1), alone.argsort(1))
    ranks = DualExpertScorer()(given)
    both = sum(each.argsort(1).argsort(1).float() + 1 for each in (visual, native)) / 2 / 36
    assert torch.allclose(ranks, both, atol=1e-6)
    better = DualExpertScorer(combine="max")(given)
    assert torch.allclose(
        better, torch.maximum(*(each.argsort(1).argsort(1).float() + 1 for each in (visual, native))) / 2 / 36
    )


def test_a_trimmer_keeps_everything_at_first_and_counts_are_each_samples_own_later() -> None:
    first, _ = fresh_stages(load_recipe("smarttrim"), HOST)
    given = tokens(8, 8, batch=4)
    assert first(given).tokens.sizes == (64,) * 4
    shaken(first.scorer)
    sizes = first(given).tokens.sizes
    assert len(set(sizes)) > 1
    assert all(4 <= size <= 64 for size in sizes)


def test_an_oracle_scores_cells_by_their_overlap_with_the_mask() -> None:
    given = tokens(4, 8, batch=1)
    box = [0.2, 0.3, 0.7, 0.9]
    fine = torch.zeros(400, 800)  # the same by pixels
    fine[120:360, 160:560] = 1.0
    expected = torch.nn.functional.avg_pool2d(fine[None], 100).flatten()
    assert torch.allclose(MaskScorer(boxes=[box])(given)[0], expected, atol=1e-5)
    both = MaskScorer(boxes=[box, [0.0, 0.0, 0.125, 0.25]])(given)[0]
    assert both[0] == 1.0
    with pytest.raises(InputError, match="is empty; expected left < right"):
        MaskScorer(boxes=[[0.5, 0.1, 0.5, 0.9]])


def test_a_router_keeps_each_region_at_one_of_three_scales() -> None:
    given = tokens(8, 12, batch=2)
    part = shaken(RegionRouterScorer(dim=4).start(HOST, seed=0))
    scores = part(given).view(2, 2, 4, 3, 4).transpose(2, 3).reshape(2, 6, 16)  # by regions
    assert torch.equal(scores.argmax(-1), torch.full((2, 6), 5))  # row 1, column 1
    four, twelve = [5, 7, 13, 15], [i for i in range(16) if i not in {5, 7, 13, 15}]
    second, third = scores[..., four[1:]], scores[..., twelve]
    assert torch.allclose(second, second[..., :1].expand_as(second), atol=1e-5)
    assert torch.allclose(third, third[..., :1].expand_as(third), atol=1e-5)
    assert bool((third[..., 0] < second[..., 0]).all())
    assert second[..., 0].flatten().unique().numel() > 6
    for bar in (-3.0, -0.5, 0.0, 0.5, 3.0):
        assert set((scores > bar).sum(-1).flatten().tolist()) <= {1, 4, 16}


def test_a_router_sees_its_region_and_nothing_else() -> None:
    given = tokens(8, 8, batch=1)
    part = shaken(RegionRouterScorer(dim=4).start(HOST, seed=0))
    changed = given.hidden.clone()
    changed[0, 0] *= torch.linspace(-2.0, 3.0, WIDTH)
    apart = (part(given) - part(replace(given, hidden=changed))).abs().view(8, 8) > 1e-6
    assert bool(apart[:4, :4].all())
    assert not bool(apart[4:].any() or apart[:, 4:].any())


def test_a_sample_below_the_bar_of_its_batch_keeps_its_best() -> None:
    (stage,) = fresh_stages(load_recipe("text-conditioned"), HOST)
    stage.scheduler = ThresholdScheduler(expected=0.5)
    scores = torch.tensor([[90.0, 80.0, 70.0, 60.0], [-60.0, -50.0, -70.0, -80.0]])
    assert soft(stage, 1)._gate(scores, (4, 4)).tolist() == [[1, 1, 1, 1], [0, 1, 0, 0]]
