"""`SoftStage`: a stage in training, where gates stand in for removal so that gradients reach the scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.core.gates import log_gate, noisy_top_k
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.stage import Stage, StageResult


class SoftStage(Stage):
    """A stage that keeps every token and gives each a gate, by its own scorer.

    The gate is hard: exactly as many are open as the budget says, and a closed one hides its token from all later
    queries. So the forward is that of the pruned model, but for the tokens' own rows, which nobody reads.

    Args:
        stage: whose parts act; they are shared, so that training them trains the stage.
        count: how many tokens to keep of a sample with so many; asked in every forward.
        generator: of the noise; on the CPU.
    """

    def __init__(self, stage: Stage, count: Callable[[int], int], generator: torch.Generator) -> None:
        super().__init__(
            place=stage.place,
            scheduler=FixedScheduler(keep=1.0),  # nothing leaves the sequence
            scorer=stage.scorer,
            raters=stage.raters,
            name=stage.name,
        )
        self._count = count
        self._generator = generator

    def forward(self, tokens: Tokens, count: Count | None = None, weights: Tensor | None = None) -> StageResult:
        weights = self.rater_weights(tokens, weights)
        scores = self.scorer(self._seen(tokens, self.scorer), self._rated(self.scorer, weights))
        counts = [min(size, max(1, self._count(size))) for size in tokens.sizes]
        gate = noisy_top_k(scores.cpu(), counts, generator=self._generator).to(scores.device)
        bias = log_gate(gate).masked_fill(~tokens.valid, 0.0)
        if tokens.bias is not None:
            bias = bias + tokens.bias
        return StageResult(replace(tokens, bias=bias), tokens.origin[:, :0], None, False, scores, weights)


class Probe(Stage):
    """A stage that changes nothing and shows what stands at its place to whoever asked.

    Args:
        stage: whose place, raters and needs it has.
        show: called with the tokens as the stage's scorer may read them, and the rater weights.
    """

    def __init__(self, stage: Stage, show: Callable[[Tokens, Tensor | None], None]) -> None:
        super().__init__(
            place=stage.place,
            scheduler=FixedScheduler(keep=1.0),
            scorer=stage.scorer,
            raters=stage.raters,
            name=stage.name,
        )
        self._show = show

    def forward(self, tokens: Tokens, count: Count | None = None, weights: Tensor | None = None) -> StageResult:
        weights = self.rater_weights(tokens, weights)
        self._show(self._seen(tokens, self.scorer), self._rated(self.scorer, weights))
        return self._untouched(tokens, weights)
