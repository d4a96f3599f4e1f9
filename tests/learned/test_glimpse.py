"""The scorer `glimpse`: where it starts, what it reads, and that it learns which head to believe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.learned import Host
from tokenprune.parts.scorers.glimpse import FLOOR, GlimpseScorer
from tokenprune.parts.work import Work

HEADS, WIDTH, N, PLANTED = 4, 8, 24, 3
HOST = Host("", WIDTH, HEADS)
RATERS = torch.ones(1, 1)


class Rows:
    """Attention that is given, ``[B, H, N]``: the `Attention` of tokens."""

    def __init__(self, paid: Tensor) -> None:
        self.paid = paid

    def scores(self, raters: Tensor, **asked: Any) -> Tensor:
        assert asked == {"normalise": "vision"}
        return self.paid


def tokens(seed: int, batch: int = 32) -> tuple[tp.Tokens, Tensor]:
    """Three planted tokens a sample, and where they are, [B, N]. Head 2 pays most to them, but heads 0 and 1 to three
    others, so that the mean over heads is misled. What a token shows tells nothing."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, N, generator=draw).argsort(1)
    planted = torch.zeros(batch, N).scatter_(1, order[:, :PLANTED], 1.0)
    others = torch.zeros(batch, N).scatter_(1, order[:, -PLANTED:], 1.0)
    logits = torch.randn(batch, HEADS, N, generator=draw)
    logits[:, 2] += 3.0 * planted
    logits[:, :2] += 3.0 * others[:, None]
    made = tp.Tokens.from_hidden(torch.randn(batch, N, WIDTH, generator=draw))
    return replace(made, attention=cast(Any, Rows(logits.softmax(-1)))), planted


def recall(scores: Tensor, planted: Tensor) -> float:
    """Share of the planted tokens among as many best."""
    best = torch.zeros_like(planted).scatter_(1, scores.topk(PLANTED).indices, 1.0)
    return float((best * planted).sum() / planted.sum())


def test_training_starts_at_the_mean_over_heads_and_a_bar_of_0_at_an_even_look() -> None:
    given, _ = tokens(0)
    scores = GlimpseScorer(dim=8, picture=False).start(HOST, seed=0)(given, RATERS)
    paid = given.attention.paid.mean(1)  # type: ignore[union-attr]
    assert torch.equal(scores.argsort(1), paid.argsort(1))
    assert torch.equal(scores > 0, paid * N + FLOOR > 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_which_head_to_believe(seed: int) -> None:
    """On samples that it was not taught with: better than its untrained self, and than chance, at equal counts."""
    part = GlimpseScorer(dim=16, picture=False).start(HOST, seed=seed).requires_grad_(True)
    held_out, wanted = tokens(1000 + seed, batch=200)
    before = recall(part(held_out, RATERS), wanted)
    optimiser = torch.optim.AdamW(part.parameters(), lr=1e-2)
    for step in range(60):
        given, planted = tokens(step)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(part(given, RATERS), planted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = recall(part(held_out, RATERS).detach(), wanted)
    assert before < 0.4
    assert after > max(before, PLANTED / N) + 0.3


def test_other_numbers_of_heads_are_refused_by_name() -> None:
    given, _ = tokens(0)
    part = GlimpseScorer(dim=8, picture=False).start(Host("", WIDTH, 2), seed=0)
    with pytest.raises(InputError, match="scorer 'glimpse': its weights are for 2 heads, got 4"):
        part(given, RATERS)
    with pytest.raises(RecipeError, match="does not say how many"):
        GlimpseScorer(dim=8).start(Host("", WIDTH), seed=0)


def test_its_cost_is_that_of_its_products() -> None:
    work = Work(
        tokens=40, kept=10, total=40, text=6, raters=1, sequence=50, width=WIDTH, heads=2, kv_heads=2, head_dim=4
    )
    rows = 50 * 2 * 4 + 50 * 2
    block = 2 * 4 + 8 * 4 + 2 * (8 * 4) + 4 * 4 + 2 * (4 * 8) + 4
    assert GlimpseScorer(dim=4).multiply_adds(work) == rows + 40 * block + 2 * 40 * 40 * 4
    blind = block - 8 * 4 - 2 * 4 * 4
    assert GlimpseScorer(dim=4, picture=False).multiply_adds(work) == rows + 40 * blind + 2 * 40 * 40 * 4
