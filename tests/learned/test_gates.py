"""Gates: hard values, soft gradients, exact counts, and a bias that equals removal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.gates import EPSILON, gumbel, log_gate, noisy_top_k


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.data())
def test_noisy_top_k_opens_exactly_as_many_as_asked(size: int, data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, size)) for _ in range(3)]
    seed = data.draw(st.integers(0, 99))
    scores = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    gate = noisy_top_k(scores, counts, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(gate.detach().round(), gate.detach())
    assert gate.detach().sum(1).tolist() == counts
    gate.sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
    inside = [row for row, count in enumerate(counts) if 0 < count < size]
    assert all(bool((scores.grad[row] > 0).all()) for row in inside)


def test_padding_is_never_open() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    for seed in range(20):
        gate = noisy_top_k(scores, [2], generator=torch.Generator().manual_seed(seed))
        assert gate.tolist() == [[1, 1, 0, 0]]
        assert gumbel(scores, generator=torch.Generator().manual_seed(seed))[0, 2:].tolist() == [0, 0]


def test_noise_tries_what_would_not_have_been_chosen() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    opened = torch.stack(
        [noisy_top_k(scores, [1], generator=torch.Generator().manual_seed(seed))[0] for seed in range(400)]
    ).mean(0)
    # Gumbel noise draws from the softmax of the scores
    assert torch.allclose(opened, scores[0].softmax(0), atol=0.08)


def test_gumbel_opens_by_the_sigmoid_of_the_score() -> None:
    scores = torch.full((1, 4000), 1.0).requires_grad_()
    gate = gumbel(scores, generator=torch.Generator().manual_seed(0))
    assert gate.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.03)
    gate.sum().backward()
    assert scores.grad is not None and bool((scores.grad > 0).all())


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_a_closed_gate_hides_a_key_and_an_open_one_changes_nothing(dtype: torch.dtype) -> None:
    gate = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    bias = log_gate(gate, dtype)
    assert bias[gate == 1].tolist() == [0.0] * 3
    draw = torch.Generator().manual_seed(0)
    logits, values = torch.randn(1, 5, generator=draw), torch.randn(5, 3, generator=draw)
    biased = (logits + bias).softmax(-1) @ values
    removed = logits[gate == 1].softmax(-1) @ values[gate[0] == 1]
    assert (biased - removed).abs().max() < 20 * EPSILON[dtype]
