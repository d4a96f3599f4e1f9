"""What attaching costs, to the microsecond: time inside the hooks on a model, as a share of its prefill.

A difference of two whole prefills tells it to the noise of the machine only, which is larger than what is looked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import PreTrainedModel

from tokenprune.families.noise import usual_pictures
from tokenprune.recipe import Recipe
from tokenprune.study.bench.sides import open_side


def hook_share(model: PreTrainedModel, recipe: Recipe, *, tokens: int, text: int, rounds: int) -> float:
    """Median over `rounds` prefills of one picture, after one that does not count."""
    shares = []
    with ExitStack() as stack:
        side = open_side(stack, "hooks", model, usual_pictures(model.config, tokens), recipe)
        spent = clock(side.model)
        prompt = side.prompt(text=text, batch=1)
        for _ in range(rounds + 1):
            spent.clear()
            prefill = side.run(prompt, 1).prefill
            shares.append(sum(spent) / prefill)
    return statistics.median(shares[1:])


def clock(model: PreTrainedModel) -> list[float]:
    """Lets every hook on `model` add the seconds that it takes to the list returned."""
    spent: list[float] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.update({key: _timed(hook, spent) for key, hook in hooks.items()})
    return spent


def _timed(hook: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    return timed
