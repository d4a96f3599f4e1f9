"""Plans of merging: one function applies them, its inverse restores the grid, nothing that travels is lost."""

from __future__ import annotations

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core import ops
from tokenprune.core.merge import Merge, merge, merged_mass, reduce, unmerge
from tokenprune.core.tokens import Tokens


@st.composite
def plans(draw: st.DrawFn) -> tuple[Tokens, torch.Tensor, tuple[int, ...], Merge]:
    """One sample: survivors, some dropped tokens as anchors, every other dropped token in one of them."""
    tokens = strategies.collate([draw(strategies.samples(least=2))])
    n = tokens.sizes[0]
    order = draw(st.permutations(range(n)))
    survivors = draw(st.integers(0, n - 1))
    anchors = draw(st.integers(0 if survivors else 1, n - survivors))
    kept, chosen = sorted(order[:survivors]), sorted(order[survivors : survivors + anchors])
    targets = chosen + kept
    joins = {i: i if i in targets else draw(st.sampled_from(targets)) for i in range(n)}
    weight = torch.tensor([[joins[source] == target for source in range(n)] for target in targets])
    plan = Merge(
        source=torch.arange(n)[None],
        target=torch.tensor([targets]),
        weight=weight[None].float(),
        hard=True,
        anchors=(anchors,),
        mean=draw(st.booleans()),
        source_counts=(n,),
    )
    return tokens, torch.tensor([kept], dtype=torch.int64), (survivors,), plan


@settings(max_examples=60)
@given(plans())
def test_a_plan_is_the_loop_over_its_pairs(made) -> None:
    tokens, kept, counts, plan = made
    left, written = reduce(tokens, kept, counts, plan, merge(tokens.hidden, plan))
    left.check()
    targets = plan.target[0].tolist()
    assert left.origin[0].tolist() == tokens.origin[0, sorted(targets)].tolist()
    assert left.origin[0, written[0]].tolist() == tokens.origin[0, plan.target[0]].tolist()
    for place, target in zip(written[0].tolist(), range(len(targets)), strict=True):
        sources = [i for i in range(tokens.sizes[0]) if plan.weight[0, target, i] > 0]
        total = sum(tokens.hidden[0, i] for i in sources)
        expected = total / len(sources) if plan.mean else total
        assert torch.allclose(left.hidden[0, place], expected, atol=1e-5)
        assert left.mass[0, place] == len(sources)
    assert left.mass.sum() == tokens.mass.sum()


@settings(max_examples=60)
@given(plans())
def test_unmerge_gives_every_token_what_its_target_has_become(made) -> None:
    tokens, kept, counts, plan = made
    n, targets = tokens.sizes[0], sorted(plan.target[0].tolist())
    left, _ = reduce(tokens, kept, counts, plan, merge(tokens.hidden, plan))
    full = unmerge(left.hidden, torch.tensor([targets]), plan, n)
    for source in range(n):
        target = plan.target[0, plan.weight[0, :, source].int().argmax()]
        assert torch.allclose(full[0, source], left.hidden[0, targets.index(int(target))], atol=1e-6)


def test_dropped_tokens_come_back_as_zeros_and_survivors_as_they_are() -> None:
    x = torch.randn(1, 2, 3)
    full = unmerge(x, torch.tensor([[1, 3]]), None, 5)
    assert torch.equal(full[:, [1, 3]], x)
    assert (full[:, [0, 2, 4]] == 0).all()


def test_weights_of_transport_split_a_token_over_two_targets() -> None:
    """Token 1 goes to tokens 0 and 2 by shares of a quarter and three quarters; states are means by those weights."""
    hidden, mass = torch.tensor([[[0.0], [8.0], [2.0]]]), torch.ones(1, 3)
    weight = torch.tensor([[[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]]])
    plan = Merge(
        source=torch.tensor([[0, 1, 2]]), target=torch.tensor([[0, 2]]), weight=weight, anchors=(0,), share=weight
    )
    assert torch.allclose(merge(hidden, plan), torch.tensor([[[2.0 / 1.25], [8.0 / 1.75]]]))
    assert torch.allclose(merged_mass(mass, plan), torch.tensor([[1.25, 1.75]]))
    restored = unmerge(torch.tensor([[[10.0], [20.0]]]), torch.tensor([[0, 2]]), plan, 3)
    assert torch.allclose(restored.flatten(), torch.tensor([10.0, 17.5, 20.0]))


def test_padded_samples_are_merged_as_if_alone() -> None:
    """The second sample has fewer sources, fewer targets and fewer anchors; padding is never read."""
    hidden = torch.randn(2, 4, 3)
    hidden[1, 3] = torch.nan
    first, second = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).bool(), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    plan = Merge(
        source=torch.tensor([[0, 1, 2, 3], [0, 2, -1, -1]]),
        target=torch.tensor([[2, 3], [2, -1]]),
        weight=torch.stack([first, second]).float(),
        hard=True,
        anchors=(2, 1),
    )
    tokens = Tokens.from_hidden(hidden.nan_to_num()).take(torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]]), (4, 3))
    left, written = reduce(tokens, torch.tensor([[0, 1], [1, -1]]), (2, 1), plan, merge(hidden, plan))
    left.check()
    assert left.origin.tolist() == [[0, 1, 2, 3], [1, 2, -1, -1]]
    assert written.tolist() == [[2, 3], [1, -1]]
    assert torch.allclose(left.hidden[1, 1], (hidden[1, 0] + hidden[1, 2]) / 2)
    assert left.mass.tolist() == [[1, 1, 2, 2], [1, 2, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((1, 300, 1), 400.0, dtype=dtype)  # 120000 overflows float16
    plan = Merge(
        source=torch.arange(300)[None],
        target=torch.tensor([[0]]),
        weight=torch.ones(1, 1, 300),
        hard=True,
        anchors=(1,),
    )
    assert merge(x, plan).item() == x[0, 0, 0].item()


def test_whatever_travels_is_merged_by_the_same_plan() -> None:
    """Positions, cells, features of any rank."""
    x = torch.arange(24.0).view(1, 4, 3, 2)
    weight = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]]])
    plan = Merge(source=torch.arange(4)[None], target=torch.tensor([[0, 2]]), weight=weight, anchors=(0,))
    assert torch.equal(merge(x, plan), torch.stack([x[:, :2].mean(1), x[:, 2:].mean(1)], dim=1))
    left = ops.take_rows(x, plan.target)
    assert unmerge(left, plan.target, plan, 4).shape == x.shape
