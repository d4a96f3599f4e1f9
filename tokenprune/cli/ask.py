"""The same question to the untouched and to the reduced model, timed fairly."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from tokenprune.engine.attach import attach
from tokenprune.study.bench.clock import FirstToken, wait
from tokenprune.study.bench.result import paired_speedup

if TYPE_CHECKING:
    from tokenprune.core.report import Report
    from tokenprune.families.chat import Chat
    from tokenprune.recipe import Recipe
    from tokenprune.study.statistics import Estimate

ROUNDS = 7
"""Timed runs of each side, at most."""
ENOUGH = 3.0
"""Seconds after which no further round is started."""


@dataclass
class Side:
    """One side of the comparison: its answer, and the times of its runs."""

    answer: str = ""
    tokens: int = 0
    """Tokens generated."""
    times: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first token: the prefill."""

    @property
    def seconds(self) -> float:
        """Median time of prefill and generation."""
        return median(self.times)

    @property
    def first_seconds(self) -> float:
        """Median time to the first token."""
        return median(self.first)


@dataclass
class Comparison:
    """What came out of both sides."""

    untouched: Side
    reduced: Side
    report: Report
    """Of the last reduced run."""
    method_seconds: float
    """Median time that the recipe's stages took, part of the reduced side's time."""

    @property
    def first_speedup(self) -> Estimate:
        """How many times as fast the first token came, paired by round, of the last odd number of rounds."""
        rounds = len(self.reduced.first)
        last = rounds - (rounds % 2 == 0)
        return paired_speedup(self.untouched.first[-last:], self.reduced.first[-last:])


def compare(chat: Chat, inputs: dict[str, Any], recipe: Recipe, *, max_new_tokens: int) -> Comparison:
    """Ask both sides in turn, the first try of each thrown out as warm-up, as often as is cheap.

    Raises:
        TokenPruneError: the recipe does not fit the model or these inputs; nothing has been generated then.
    """
    with attach(chat.model, recipe):
        chat.generate(inputs, 1)
    chat.generate(inputs, 1)
    untouched, reduced = Side(), Side()
    method: list[float] = []
    begin = time.perf_counter()
    for number in range(ROUNDS):
        # Whoever runs second may profit from a warmer cache: take turns.
        for side in (untouched, reduced) if number % 2 == 0 else (reduced, untouched):
            if side is untouched:
                _time(chat, inputs, side, max_new_tokens)
                continue
            with attach(chat.model, recipe) as attached:
                _time(chat, inputs, side, max_new_tokens)
            method.append(attached.report.seconds)
            report = attached.report
        if time.perf_counter() - begin > ENOUGH:
            break
    return Comparison(untouched, reduced, report, median(method))


def _time(chat: Chat, inputs: dict[str, Any], side: Side, max_new_tokens: int) -> None:
    device = chat.model.device
    clock = FirstToken(device)
    wait(device)
    start = time.perf_counter()
    (ids,) = chat.generate(inputs, max_new_tokens, stopping_criteria=[clock])
    wait(device)
    side.times.append(time.perf_counter() - start)
    side.first.append(clock.first - start)
    side.tokens, side.answer = len(ids), chat.text(ids)
