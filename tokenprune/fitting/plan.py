"""`Plan`: what a fit does, fixed when it starts, so that resuming never changes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from tokenprune.errors import InputError, did_you_mean
from tokenprune.fitting.rewards import Rewards
from tokenprune.recipe import Recipe

Aim = Literal["attention", "logits", "boxes", "reward"]
"""What is learned from: where the untouched model looks, what it says, boxes around what is asked for, or rewards of
answers."""


@dataclass(frozen=True)
class Plan:
    """What a fit does.

    Raises:
        InputError: a number out of range, or an unknown aim.
    """

    aim: Aim = "attention"
    """``attention``: scores learn the attention of the last text token, which is cheap: the model runs forward only.
    ``logits``: the model runs with gates in place of removed tokens, and its predictions learn to stay the same.
    ``boxes``: scores learn which tokens the box of a question touches; questions without one are left out.
    ``reward``: of a recipe that asks again, the request learns which questions need the full picture."""
    steps: int = 400
    """Optimiser steps."""
    batch: int = 16
    """Questions in each."""
    rate: float = 3e-3
    """Highest learning rate of the one-cycle schedule."""
    keep: tuple[float, float] = (0.05, 0.5)
    """Shares of the vision tokens between which each step draws its budget; only ``logits`` has budgets."""
    layers: tuple[float, float] = (0.25, 0.75)
    """From which to which share of the depth attention is averaged; only ``attention`` looks."""
    answer_tokens: int = 6
    """Most tokens of the untouched model's own answer that are compared; ``logits`` and ``reward`` read them."""
    held_out: float = 0.1
    """Share of the questions that are not trained on, but tell when to stop."""
    patience: int = 8
    """Looks at the held-out questions, one every twentieth of the steps, without an improvement before it stops."""
    seed: int = 0
    rewards: Rewards = field(default_factory=Rewards)
    """Only ``reward`` has them."""

    def __post_init__(self) -> None:
        if self.aim not in get_args(Aim):
            known = get_args(Aim)
            raise InputError(f"aim: expected {', '.join(known)}, got {self.aim!r}{did_you_mean(self.aim, known)}")
        for name in ("steps", "batch", "answer_tokens", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("keep", "layers"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1 or high == 0:
                raise InputError(f"{name}: expected two shares in order, such as 0.05 0.5, got {low} {high}")
        if not 0 < self.held_out < 1 or self.rate <= 0:
            raise InputError(f"held_out and rate: expected above 0, got {self.held_out} and {self.rate}")

    @property
    def look_every(self) -> int:
        """Steps from one look at the held-out questions to the next."""
        return max(1, self.steps // 20)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        data = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.aim != "reward":
            del data["rewards"]  # so that folders of fits from before there were any are known again
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        known: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        if "rewards" in known:
            known["rewards"] = Rewards(**known["rewards"])
        return cls(**known)

    @classmethod
    def usual(cls, recipe: Recipe, **settings: Any) -> Plan:
        """The plan of the aim that fits a recipe: ``reward`` for one that asks again."""
        return cls(aim="attention" if recipe.again is None else "reward", **settings)
