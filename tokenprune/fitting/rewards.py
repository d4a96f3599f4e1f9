"""Rewards of a request for the full picture, and advantages within groups: what a policy gradient needs, as formulas.

A question is asked several times (rollouts); in each, the policy answers directly or asks for the full picture.
VisionThink (arXiv:2507.13348) rewards a right answer with 1, less a control which keeps either action from being taken
always, and compares each rollout with the others of its question (GRPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenprune.errors import InputError, did_you_mean

Ratio = Literal["conditional", "count", "released"]
"""How the control tells whether a question needs the full picture; see `request_control`."""
RightBy = Literal["untouched", "labels"]
"""When an answer is right: it is the untouched model's on the full picture, or the data says so."""


@dataclass(frozen=True)
class Rewards:
    """How requests are rewarded.

    Raises:
        InputError: a number out of range, or an unknown word.
    """

    right: RightBy = "untouched"
    """``untouched``: right is what the untouched model says of the full picture, so no labels are needed, and asking is
    always right. ``labels``: as the questions say (`right` of `tokenprune.study.cases.Case`)."""
    rollouts: int = 16
    """Of each question in a step; the paper has 16."""
    ratio: Ratio = "conditional"
    amount: float = 0.1
    """What the control takes from a reward of 1; 0 for none."""
    theta: float = 0.2
    """Ratio below which a question needs the full picture."""

    def __post_init__(self) -> None:
        for name, given, known in (("right", self.right, get_args(RightBy)), ("ratio", self.ratio, get_args(Ratio))):
            if given not in known:
                raise InputError(f"{name}: expected {' or '.join(known)}, got {given!r}{did_you_mean(given, known)}")
        if self.rollouts < 2:
            raise InputError(f"rollouts: expected at least 2, which are compared with each other, got {self.rollouts}")
        if not (0 <= self.amount < 1 and 0 <= self.theta <= 1):
            raise InputError(f"amount and theta: expected shares of 1, got {self.amount} and {self.theta}")

    def of(self, correct: Tensor, asked: Tensor) -> Tensor:
        """``[G, n]`` reward of each rollout: 1 for a right answer, less the control.

        Args:
            correct: ``[G, n]`` True where the answer was right.
            asked: ``[G, n]`` True where the full picture was asked for.
        """
        return correct.float() - request_control(correct, asked, ratio=self.ratio, amount=self.amount, theta=self.theta)


def group_advantages(rewards: Tensor) -> Tensor:
    """How much better each rollout did than its group, in standard deviations of the group: GRPO's advantage.

    ``(r - mean) / std`` over the last dimension; 0 throughout where all did alike, which teaches nothing.

    Args:
        rewards: ``[..., n]`` of the rollouts of each group.

    Returns:
        ``[..., n]``, which sum to 0 in each group.
    """
    off = rewards - rewards.mean(-1, keepdim=True)
    spread = off.square().mean(-1, keepdim=True).sqrt()
    alike = spread <= 1e-6  # rounding of the mean
    return torch.where(alike, 0.0, off / spread.masked_fill(alike, 1.0))


def request_control(correct: Tensor, asked: Tensor, *, ratio: Ratio, amount: float = 0.1, theta: float = 0.2) -> Tensor:
    """What VisionThink takes from the rewards of a group, so that neither action is taken always (Eq. 5).

    With a ratio r that is small where the small picture does not do: right direct answers lose `amount` where
    ``r < theta``, as they were lucky; right answers to the full picture lose it elsewhere, as they did not need it.
    Wrong answers lose nothing more.

    ``count``: the paper's, ``r = C_direct / (C_direct + C_full)`` of right answers. It hangs on how often each action
    is taken: a policy that asks nearly always has few direct answers, right as they may be, and is kept there.
    ``released``: what the authors' code does. A right answer to the full picture always loses, a right direct one
    where ``0 < r < theta``, with the paper's r.
    ``conditional``: ours. ``r = p_direct / (p_direct + p_full)`` of how often each action is right when it is taken,
    ``p = (C + 1/2) / (n + 1)``, so it tells of the question and not of the policy.

    Args:
        correct: ``[..., n]`` True where the answer was right.
        asked: ``[..., n]`` True where the full picture was asked for.
        ratio: how r is made.
        amount: what is taken.
        theta: below which r a group needs the full picture.

    Returns:
        ``[..., n]``, to be subtracted.
    """
    direct = ~asked
    right_direct, right_full = (correct & direct).sum(-1, keepdim=True), (correct & asked).sum(-1, keepdim=True)
    if ratio == "conditional":
        p_direct = (right_direct + 0.5) / (direct.sum(-1, keepdim=True) + 1)
        p_full = (right_full + 0.5) / (asked.sum(-1, keepdim=True) + 1)
        r = p_direct / (p_direct + p_full)
    else:
        r = right_direct / (right_direct + right_full).clamp(min=1)
    needs = r < theta
    if ratio == "released":
        lose = asked | needs  # r is 0 where no direct answer was right: none to take from
    else:
        lose = torch.where(needs, direct, asked)
    return amount * (correct & lose).float()
