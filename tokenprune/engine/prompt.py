"""A prefill on its way through the stages: its prompt, how many tokens each stage will keep, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tokenprune.budget import survivors
from tokenprune.core.tokens import Tokens
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage, StageResult


@dataclass(frozen=True, eq=False)
class Prompt:
    """A forward that brings vision tokens, before any stage."""

    tokens: Tokens
    """All vision tokens; `hidden` is their input embedding, `slot` their index in this forward."""
    text: Tensor
    """``[B, T]`` index in this forward of the text tokens that may rate; 0 on padding."""
    real: Tensor | None
    """``[B, L]`` bool, False on the prompt's padding; None without."""
    counts_up: bool
    """Whether position ids count up one by one to the end of every row, from the first token that is no padding."""
    others: tuple[int, ...]
    """Tokens of the prompt that are neither vision tokens nor padding, of each sample."""
    raters: tuple[int, ...]
    """Of these, the ones behind the first image, which may rate."""


@dataclass(eq=False)
class Prefill:
    """What the stages of one forward share."""

    prompt: Prompt
    counts: tuple[tuple[int | None, ...], ...]
    """For each stage, tokens to keep of each sample; None where the scores decide."""
    lengths: list[int]
    """Real length of each row of the present sequence."""
    text: Tensor
    """``[B, T]`` index of the rating text tokens in the present sequence."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Rater weights that later stages share, by `Stage.shared_raters`."""

    def run(self, number: int, stage: Stage, tokens: Tokens) -> StageResult:
        """What `stage`, the one of this number, makes of `tokens`."""
        counts, raters = self.counts[number], stage.shared_raters
        count = None if None in counts else tuple(c for c in counts if c is not None)
        result = stage(tokens, count, None if raters is None else self.weights.get(raters))
        if raters is not None and result.weights is not None:
            self.weights[raters] = result.weights
        return result

    def dropped(self, pipeline: Pipeline, depth: int) -> list[int]:
        """By how many tokens the sequence is shorter at each of `depth` layers; all counts are known."""
        steps, gone = pipeline.steps(depth), [0] * depth
        rows = []
        for row, total in enumerate(self.prompt.tokens.total):
            counts = [c for c in (stage[row] for stage in self.counts) if c is not None]
            rows.append([total - size for size in survivors(steps, counts, total)])
        for step, each in zip(steps, zip(*rows, strict=True), strict=True):
            gone[step.layer :] = [min(each)] * (depth - step.layer)
        return gone


def planned(prompt: Prompt, pipeline: Pipeline, depth: int, length: int) -> Prefill:
    """The prefill of `prompt`, `length` tokens a row, before any stage of `pipeline`.

    Raises:
        BudgetError: the budget cannot be met.
    """
    tokens = prompt.tokens
    plans = [
        pipeline.plan(total, grids, depth, text=text, question=question)
        for total, grids, text, question in zip(tokens.total, tokens.grids, prompt.others, prompt.raters, strict=True)
    ]
    return Prefill(prompt, tuple(zip(*plans, strict=True)), [length] * len(plans), prompt.text)
