"""Every learned part learns what it is for: on samples it was not taught with, better than it starts and than chance.

The tasks are small and planted, so that what there is to find is known. What a fit brings on a model is measured by
`benchmarks/learned`, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import tokenprune as tp
from tokenprune.core import ops
from tokenprune.parts.learned import Host
from tokenprune.parts.recyclers.abstraction import AbstractionRecycler
from tokenprune.parts.recyclers.convolution import ConvolutionRecycler
from tokenprune.parts.recyclers.fusion import FusionRecycler
from tokenprune.parts.scorers.learned import TextConditionedScorer
from tokenprune.parts.scorers.region_router import RegionRouterScorer
from tokenprune.parts.scorers.trimmer import TrimmerScorer

WIDTH, KEYS, PLANTED, SIDE = 16, 6, 3, 4
N = SIDE * SIDE
HOST = Host("", WIDTH, 2)
TABLES = torch.randn(3, KEYS, WIDTH, generator=torch.Generator().manual_seed(99))
"""What keys, values and questions look like."""


def train(part: Any, loss: Callable[[Any, int], Tensor], steps: int) -> None:
    """Minimise `loss` of the part over samples of numbers from 0 on."""
    part.requires_grad_(True)
    optimiser = torch.optim.AdamW(part.parameters(), lr=1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        loss(part, step).backward()
        optimiser.step()
    part.requires_grad_(False)


def asked(seed: int, batch: int = 32) -> tuple[tp.Tokens, Tensor, Tensor]:
    """Tokens of a key and a value each, a question of one key, which three of them have, and the one value of these.

    Returns:
        The tokens, where the three are ``[B, N]``, and what their value looks like ``[B, D]``.
    """
    draw = torch.Generator().manual_seed(seed)
    question, value = (torch.randint(KEYS, (batch, 1), generator=draw) for _ in range(2))
    planted = torch.zeros(batch, N).scatter_(1, torch.rand(batch, N, generator=draw).argsort(1)[:, :PLANTED], 1.0)
    others = (question + torch.randint(1, KEYS, (batch, N), generator=draw)) % KEYS  # never the key that is asked for
    keys = torch.where(planted > 0, question, others)
    values = torch.where(planted > 0, value, torch.randint(KEYS, (batch, N), generator=draw))
    hidden = TABLES[0][keys] + TABLES[1][values] + 0.3 * torch.randn(batch, N, WIDTH, generator=draw)
    return tp.Tokens.from_hidden(hidden, grid=(SIDE, SIDE), text=TABLES[2][question]), planted, TABLES[1][value[:, 0]]


def recall(part: Any) -> float:
    """Share of the planted tokens among as many best, on samples that nothing was taught with."""
    given, planted, _ = asked(10_000, batch=200)
    best = ops.top_k(part(given).detach(), (PLANTED,) * 200)
    return float(planted.gather(1, best).mean())


@pytest.mark.parametrize("kind", [TextConditionedScorer, TrimmerScorer])
def test_scorers_find_what_the_question_asks_for(kind: Any) -> None:
    found = {}
    for question in (True, False):
        part = kind(dim=16, question=question).start(HOST, seed=0)
        before = recall(part)
        train(part, lambda part, step: binary_cross_entropy_with_logits(part((one := asked(step))[0]), one[1]), 150)
        found[question] = recall(part), before
    chance = PLANTED / N
    after, before = found[True]
    assert after > 0.8 > max(before, chance) + 0.3
    assert found[False][0] < 0.45, "who does not read the question cannot know"


KEPT = 4


def carried(part: Any, seed: int, batch: int = 32) -> Tensor:
    """How far the states of four even survivors are from what the question asks for, added to each."""
    given, _, wanted = asked(seed, batch)
    kept = torch.arange(1, N, N // KEPT)[None].expand(batch, -1)
    made = part.recycle(given, kept, torch.zeros(batch, N), KEPT).hidden
    return mse_loss(made - given.hidden[:, 1 :: N // KEPT], wanted[:, None].expand(-1, KEPT, -1))


def test_abstraction_carries_the_answer_to_survivors_that_do_not_have_it() -> None:
    part = AbstractionRecycler(dim=16).start(HOST, seed=0)
    before = carried(part, 10_000, 200).item()
    train(part, carried, 200)
    assert carried(part, 10_000, 200).item() < 0.6 * before


def beside(part: Any, seed: int, batch: int = 32) -> Tensor:
    """How far each of four survivors is from the state of its neighbour on the right, which is dropped."""
    draw = torch.Generator().manual_seed(seed)
    given = tp.Tokens.from_hidden(
        torch.randn(batch, N, WIDTH, generator=draw),
        grid=(SIDE, SIDE),
        text=torch.randn(batch, 2, WIDTH, generator=draw),
    )
    kept = torch.tensor([0, 2, 8, 10])[None].expand(batch, -1)
    made = part.recycle(given, kept, torch.zeros(batch, N), KEPT).hidden
    return mse_loss(made, given.hidden[:, [1, 3, 9, 11]])


@pytest.mark.parametrize("kind", [FusionRecycler, ConvolutionRecycler])
def test_local_recyclers_tell_a_neighbour_from_the_others(kind: Any) -> None:
    """An average cannot: it forgets where in its surroundings something was."""
    part = kind(dim=32).start(HOST, seed=0)
    before = beside(part, 10_000, 200).item()
    train(part, beside, 200)
    assert beside(part, 10_000, 200).item() < 0.7 * before


def regions(seed: int, batch: int = 16) -> tuple[tp.Tokens, Tensor]:
    """Pictures of 2 x 2 regions, flat or with texture, and which tokens have texture ``[B, 64]``."""
    draw = torch.Generator().manual_seed(seed)
    busy = (torch.rand(batch, 2, 2, generator=draw) < 0.4).float()
    busy = busy.repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1)
    base = torch.randn(batch, 2, 2, WIDTH, generator=draw).repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    noise = torch.randn(batch, 64, WIDTH, generator=draw)
    return tp.Tokens.from_hidden(base + noise * (0.05 + busy[..., None]), grid=(8, 8)), busy


def test_a_router_keeps_texture_whole_and_what_is_flat_as_one() -> None:
    part = RegionRouterScorer(dim=16).start(HOST, seed=0)
    train(part, lambda part, step: binary_cross_entropy_with_logits(part((one := regions(step))[0]), one[1]), 100)
    given, busy = regions(10_000, batch=100)
    kept = (part(given) > 0).float()
    assert kept[busy > 0].mean() > 0.85
    assert kept[busy == 0].mean() < 0.2  # one of 16 is always kept
