"""`SoftStage`: a stage in training, where gates stand in for removal so that gradients reach the scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.gates import batch_threshold, gumbel, log_gate, noisy_top_k
from tokenprune.core.merge import Merge, merged_mass
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import RecipeError
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.schedulers.threshold import ThresholdScheduler
from tokenprune.stage import Stage, StageResult

CLOSED = -5.0
"""A bias below which an earlier stage has closed its gate: above the logarithm of any of `gates.EPSILON`."""


class SoftStage(Stage):
    """A stage that keeps every token and gives each a gate, by its own scorer.

    The gate is hard: exactly as many are open as the budget says, and a closed one hides its token from all later
    queries. So the forward is that of the pruned model, but for the tokens' own rows, which nobody reads. The best are
    open, whatever the stage's sampler, and its recycler writes what it would write.

    Where the scheduler is ``threshold``, counts are the sample's own: gates open around the score that the expected
    share of the whole batch lies above, and `off` tells how far that is from the bar.

    Args:
        stage: whose parts act; they are shared, so that training them trains the stage.
        count: how many tokens to keep of a sample with so many; asked in every forward.
        generator: of the noise; on the CPU.

    Raises:
        RecipeError: the stage has a rectifier, whose biases would mix with those of the gates; or its tokens skip.
    """

    def __init__(self, stage: Stage, count: Callable[[int], int], generator: torch.Generator) -> None:
        if stage.rectifier is not None:
            told = f"{stage.rectifier.title} adds to attention, as gates do in training"
            raise RecipeError(
                f"{stage.name}: {told}; fit the recipe without it, and put it into the one that fit wrote"
            )
        if stage.skips:
            raise RecipeError(
                f"{stage.name}: {stage.scorer.title} learns by gates, which stand in for removal, and with dropped: "
                "skip_ffn nothing is removed; fit the recipe without it, and put it into the one that fit wrote"
            )
        super().__init__(
            place=stage.place,
            scheduler=FixedScheduler(keep=1.0),  # nothing leaves the sequence
            scorer=stage.scorer,
            raters=stage.raters,
            recycler=stage.recycler,
            name=stage.name,
        )
        self._bar = stage.scheduler if isinstance(stage.scheduler, ThresholdScheduler) else None
        self._count = count
        self._generator = generator
        self.off: Tensor | None = None
        """Squared distance from the bar of the score that the last forward's gates opened around; None: no bar."""

    # Never given pictures apart.
    def forward(  # type: ignore[override]
        self, tokens: Tokens, count: Count | None = None, weights: Tensor | None = None
    ) -> StageResult:
        weights = self.rater_weights(tokens, weights)
        scores = self.scorer(self._seen(tokens, self.scorer), self._rated(self.scorer, weights))
        here = tokens.valid if tokens.bias is None else tokens.valid & (tokens.bias > CLOSED)
        gate = self._gate(scores.masked_fill(~here, -torch.inf), tokens.sizes)
        counts = tuple(gate.detach().sum(1).int().tolist())
        seen = self._seen(tokens, self.recycler)
        plan = self.recycler(seen, ops.top_k(gate.detach(), counts), scores, counts)
        written = None
        if plan is not None:
            tokens, gate = self._written(tokens, gate, plan, self.recycler.states(seen, plan))
            # Every token: rows that are written twice, as padding would be, would get their gradient twice.
            written = torch.arange(gate.shape[1], device=gate.device).expand_as(gate).masked_fill(~tokens.valid, -1)
        bias = log_gate(gate).masked_fill(~tokens.valid, 0.0)
        bias = bias if tokens.bias is None else bias + tokens.bias
        return StageResult(replace(tokens, bias=bias), tokens.origin[:, :0], written, tokens.padded, scores, weights)

    def _gate(self, scores: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """``[B, N]`` 1 for open, 0 for closed, with a gradient; noise is drawn on the CPU, alike for every device."""
        if self._bar is None:
            there = scores.isfinite().sum(1).tolist()
            counts = [min(n, max(1, self._count(size))) for n, size in zip(there, sizes, strict=True)]
            return noisy_top_k(scores.cpu(), counts, generator=self._generator).to(scores.device)
        middle = batch_threshold(scores, self._bar.expected)
        self.off = (middle - self._bar.above).square()
        gate = gumbel((scores - middle.detach()).cpu(), generator=self._generator).to(scores.device)
        best = ops.mask_of(ops.top_k(scores.detach(), (1,) * len(sizes)), scores.shape[1])
        return torch.where(best & (gate.detach() == 0), gate + 1, gate)  # never none

    @staticmethod
    def _written(tokens: Tokens, gate: Tensor, plan: Merge, states: Tensor) -> tuple[Tokens, Tensor]:
        """The tokens with what a plan writes into their rows, and the gates with those of its anchors open."""
        anchor, real = plan.anchor, plan.target >= 0
        gate = ops.put_(gate, anchor, torch.ones_like(anchor, dtype=gate.dtype), anchor >= 0)
        hidden = ops.put_rows_(tokens.hidden, plan.target, states.to(tokens.hidden.dtype), real)
        mass = ops.put_(tokens.mass, plan.target, merged_mass(tokens.mass, plan), real)
        return replace(tokens, hidden=hidden, mass=mass), gate


def in_training(stage: Stage, share: float | None = None) -> Stage:
    """The same parts, without ``kv: all_layers``: in training, answers come together with their prompt.

    Args:
        stage: whose parts.
        share: of the tokens, in place of a count that only a budget for the whole recipe knows; None: as it was.
    """
    return Stage(
        place=stage.place,
        raters=stage.raters,
        scorer=stage.scorer,
        scheduler=stage.scheduler if share is None else FixedScheduler(keep=share),
        grouper=stage.grouper,
        sampler=stage.sampler,
        recycler=stage.recycler,
        rectifier=stage.rectifier,
        dropped=stage.dropped,
        positions=stage.positions,
        name=stage.name,
    )


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

    # Never given pictures apart.
    def forward(  # type: ignore[override]
        self, tokens: Tokens, count: Count | None = None, weights: Tensor | None = None
    ) -> StageResult:
        weights = self.rater_weights(tokens, weights)
        self._show(self._seen(tokens, self.scorer), self._rated(self.scorer, weights))
        return self._untouched(tokens, weights)
