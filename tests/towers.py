"""What the tests of vision towers share: recipes that need one, and a part that remembers what signals it got."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.recipe import list_recipes, load_recipe
from tokenprune.stage import Stage

INSIDE = [name for name in list_recipes() if any(s.place.kind == "in_vision" for s in load_recipe(name).stages)]
"""Recipes with stages inside the tower: they take no budget, and the ledger does not count them."""


class Reading(Scorer):
    """Reads signals and remembers what it got."""

    def __init__(self, *, names: tuple[str, ...] = ("class_attention",)) -> None:
        super().__init__()
        self.names = names
        self.got: dict[str, Tensor] = {}
        self.seen: Tokens | None = None

    @property
    def reads(self) -> Needs:
        return Needs(tower=self.names)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.got = {name: tokens.signal(name) for name in self.names}
        self.seen = tokens
        first = self.got[self.names[0]].float()
        return tokens.only_valid(first if first.dim() == 2 else first.flatten(2).sum(-1))


def reading(*names: str, place: Any = "after_vision", keep: float = 0.5) -> Stage:
    return Stage(place=place, scheduler=FixedScheduler(keep=keep), scorer=Reading(names=names), sampler=TopKSampler())
