"""Rewards of a request: advantages within groups, three forms of the control, and what each makes a policy do."""

from __future__ import annotations

import pytest
import torch

from tokenprune.errors import InputError
from tokenprune.fitting.rewards import Ratio, Rewards, group_advantages, request_control


def test_advantages_are_relative_to_the_group_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 16, generator=draw)
    made = group_advantages(rewards)
    assert torch.allclose(made.mean(-1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(made.square().mean(-1), torch.ones(5), atol=1e-5)
    assert torch.allclose(group_advantages(3 * rewards + 7), made, atol=1e-4), "neither scale nor level counts"
    assert torch.equal(group_advantages(rewards[1:2]), made[1:2]), "nor what else is in the batch"
    for same in (0.0, 0.1, 0.9, 1.0):
        assert torch.equal(group_advantages(torch.full((2, 7), same)), torch.zeros(2, 7)), "alike teaches nothing"


def control(ratio: Ratio, direct: str, full: str) -> tuple[list[float], list[float]]:
    """What a group loses: right (1) and wrong (0) answers, those given directly and those to the full picture."""
    correct = torch.tensor([[each == "1" for each in direct + full]])
    asked = torch.tensor([[False] * len(direct) + [True] * len(full)])
    lost = request_control(correct, asked, ratio=ratio)[0].tolist()
    return [round(each, 4) for each in lost[: len(direct)]], [round(each, 4) for each in lost[len(direct) :]]


@pytest.mark.parametrize(
    ("ratio", "direct", "full", "lost"),
    [
        # r = 1 / 5 is not below 0.2; 1 / 6 is.
        ("count", "10", "1111", ([0, 0], [0.1] * 4)),
        ("count", "10", "111110", ([0.1, 0], [0] * 6)),
        ("count", "00", "11", ([0, 0], [0, 0])),
        ("count", "0", "0", ([0], [0])),
        # As often right as the full picture, and yet "needed", as it was tried once: the paper's form, not ours.
        ("count", "1", "11111", ([0.1], [0] * 5)),
        ("conditional", "1", "11111", ([0], [0.1] * 5)),
        ("conditional", "0" * 9 + "1", "1" * 6, ([0] * 9 + [0.1], [0] * 6)),  # 1.5 / 11 against 6.5 / 7
        # The released code charges full pictures always, and direct answers only where some were right.
        ("released", "10", "111110", ([0.1, 0], [0.1] * 5 + [0])),
        ("released", "00", "11", ([0, 0], [0.1, 0.1])),
        ("released", "11", "10", ([0, 0], [0.1, 0])),
    ],
)
def test_each_form_takes_from_right_answers_what_it_says(
    ratio: Ratio, direct: str, full: str, lost: tuple[list[float], list[float]]
) -> None:
    assert control(ratio, direct, full) == lost


STARTS = (0.12, 0.50, 0.88)
RIGHT = {"easy": (0.95, 0.97), "hard": (0.12, 0.90)}
"""How often a direct answer and one to the full picture is right."""


def bandit(rewards: Rewards) -> dict[tuple[float, str], float]:
    """Rates of requests, by start and kind of question, that a policy with one logit for each kind ends with.

    32 questions, half of each kind, 16 rollouts, 400 steps of plain gradient descent at 0.125.
    """
    draw = torch.Generator().manual_seed(0)
    right = torch.tensor(list(RIGHT.values()))  # [kind, action]
    logits = torch.tensor(STARTS).logit()[:, None].repeat(1, 2)  # [start, kind]
    for _ in range(400):
        p = logits.sigmoid()[:, :, None, None]
        asked = torch.rand(len(STARTS), 2, 16, 16, generator=draw) < p
        chance = torch.where(asked, right[:, 1, None, None], right[:, 0, None, None])
        correct = torch.rand(asked.shape, generator=draw) < chance
        advantages = group_advantages(rewards.of(correct, asked))
        # d log π / d logit = asked - p; the mean is over all 32 questions.
        logits += 0.125 * (advantages * (asked.float() - p)).mean(-1).sum(-1) / 32
    rates = logits.sigmoid().tolist()
    return {(start, kind): rates[i][k] for i, start in enumerate(STARTS) for k, kind in enumerate(RIGHT)}


def test_without_a_control_easy_questions_go_on_asking() -> None:
    assert bandit(Rewards(amount=0))[0.50, "easy"] > 0.5


@pytest.mark.parametrize("ratio", ["conditional", "count", "released"])
def test_every_form_tells_the_kinds_apart_from_an_even_start(ratio: Ratio) -> None:
    rates = bandit(Rewards(ratio=ratio))
    for start in (0.12, 0.50):
        assert rates[start, "easy"] < 0.1 and rates[start, "hard"] > 0.9
    locked = rates[0.88, "easy"]  # the start that the paper warns of
    assert locked > 0.9 if ratio == "count" else locked < 0.1 if ratio == "conditional" else locked > 0.1


def test_what_rewards_cannot_be_is_told() -> None:
    with pytest.raises(InputError, match=r"ratio: expected conditional or count or released, got 'counts'.*'count'"):
        Rewards(ratio="counts")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="right: expected untouched or labels, got 'label'"):
        Rewards(right="label")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rollouts: expected at least 2"):
        Rewards(rollouts=1)
    with pytest.raises(InputError, match=r"shares of 1, got -0.1 and 0.2"):
        Rewards(amount=-0.1)
