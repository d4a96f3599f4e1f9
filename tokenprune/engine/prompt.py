"""A prefill on its way through the stages: its prompt, how many tokens each stage will keep, and what they share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokenprune.apart import Alone
from tokenprune.budget import Step, survivors
from tokenprune.core import ops
from tokenprune.core.grids import Grid
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
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
    """Of these, the ones behind the first image, which may rate; 1 where the last token stands in for them."""
    unrated: tuple[int, ...]
    """Samples without any, in a recipe with raters: the last token of each stands in. With nobody else in the batch, a
    stage that must drop refuses."""
    grids: tuple[tuple[Grid, ...], ...]
    """(T, H, W) of the pictures of each sample, with `UnknownGrid` for those that are not known."""
    causes: tuple[str | None, ...]
    """Why the grids of a sample are not known; None where they are."""
    last: Tensor | None = None
    """``[B, 1]`` index in this forward of the last token of the prompt, padding left out; None where nobody asks."""


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
    last: Tensor | None = None
    """``[B, 1]`` as `Prompt.last`, in the present sequence; where a stage has dropped it, of the last before it."""
    drops: bool = True
    """Whether a stage drops something, or may, as far as counts tell; else nothing happens to the sequence."""
    tower: frozenset[str] = frozenset()
    """Signals of the vision tower that those stages read."""
    alone: tuple[tuple[Alone, ...], ...] = ()
    """For each stage, the pictures of all samples; empty where it takes them together."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Rater weights that later stages share, by `Stage.shared_raters`."""

    gone: dict[int, Tensor] = field(default_factory=dict)
    """Of stages inside the vision tower, which have run: ``[B, N, 2]``, 1 for original tokens that are gone; masses."""

    def follow(self, gone: dict[int, Tensor]) -> None:
        """Let the language model do without the tokens that stages inside the vision tower have dropped.

        How many are left of each sample is theirs to say, so the later stages ask their schedulers when they run.
        """
        self.gone = gone
        self.counts = tuple((None,) * len(sample) for sample in self.counts)

    def run(self, number: int, stage: Stage, tokens: Tokens) -> StageResult:
        """What `stage`, the one of this number, makes of `tokens`."""
        if number in self.gone:
            return _followed(tokens, self.gone[number])
        if self.alone:
            return stage(tokens, pictures=self.alone[number])
        counts, raters = self.counts[number], stage.shared_raters
        count = None if None in counts else tuple(c for c in counts if c is not None)
        result = stage(tokens, count, None if raters is None else self.weights.get(raters))
        if raters is not None and result.weights is not None:
            self.weights[raters] = result.weights
        return result

    @property
    def graph_key(self) -> tuple[Hashable, ...]:
        """Part of the key of a compiled prefill: values that were Python constants when it was traced.

        Tokens that each stage keeps of each sample (None where the scores decide), or of each picture, text tokens that
        may rate, where there is padding, and whether positions count up.
        """
        prompt = self.prompt
        question = prompt.tokens.question
        return self.counts, self.alone, prompt.text.shape[1], question.padded, prompt.real is None, prompt.counts_up

    def dropped(self, pipeline: Pipeline, depth: int) -> list[int]:
        """By how many tokens the sequence is shorter at each of `depth` layers; all counts are known."""
        steps, gone = pipeline.steps(depth), [0] * depth
        rows = []
        for row, total in enumerate(self.prompt.tokens.total):
            counts = [c for c in (stage[row] for stage in self.counts) if c is not None]
            left = self._left_apart(steps, row) if self.alone else survivors(steps, counts, total)
            rows.append([total - size for size in left])
        for step, each in zip(steps, zip(*rows, strict=True), strict=True):
            gone[step.layer :] = [min(each)] * (depth - step.layer)
        return gone

    def _left_apart(self, steps: Sequence[Step], row: int) -> list[int]:
        """Tokens of a sample after each stage: of all its pictures, each with the merged tokens that are its own."""
        return [
            sum(one.count + step.recycler.added(one.size - one.count) for one in pictures if one.row == row)
            for step, pictures in zip(steps, self.alone, strict=True)
        ]


def planned(prompt: Prompt, pipeline: Pipeline, depth: int, length: int) -> Prefill:
    """The prefill of `prompt`, `length` tokens a row, before any stage of `pipeline`.

    Raises:
        BudgetError: the budget cannot be met.
        InputError: a stage must drop something, and the prompt does not give what its parts read.
    """
    tokens = prompt.tokens
    plans = [
        pipeline.plan(total, grids, depth, text=text, question=question)
        for total, grids, text, question in zip(tokens.total, tokens.grids, prompt.others, prompt.raters, strict=True)
    ]
    counts = tuple(zip(*plans, strict=True))
    alone = pipeline.alone(tokens.total, tokens.grids, depth) if pipeline.apart else ()
    acting = (
        [stage for stage, own in zip(pipeline, alone, strict=True) if any(one.count != one.size for one in own)]
        if alone
        else list(_acting(pipeline, counts, tokens.total, depth))
    )
    for stage in acting:
        _check(stage, prompt)
    tower = frozenset(name for stage in acting for name in stage.reads.tower)
    return Prefill(
        prompt,
        counts,
        [length] * len(plans),
        prompt.text,
        last=prompt.last,
        drops=bool(acting),
        tower=tower,
        alone=alone,
    )


def _acting(
    pipeline: Pipeline, counts: Sequence[Sequence[int | None]], total: Sequence[int], depth: int
) -> Iterator[Stage]:
    """The stages that will drop something, or may, as far as their counts tell."""
    sizes: list[int | None] = list(total)
    for stage, step, kept in zip(pipeline, pipeline.steps(depth), counts, strict=True):
        if any(k is None or k != size for k, size in zip(kept, sizes, strict=True)):
            yield stage
        sizes = [
            None if k is None or size is None else k + step.recycler.added(size - k)
            for k, size in zip(kept, sizes, strict=True)
        ]


def _check(stage: Stage, prompt: Prompt) -> None:
    """Raise `InputError` if a part of `stage` cannot have what it reads of `prompt`."""
    nobody = len(prompt.unrated) == sum(n > 0 for n in prompt.tokens.total)
    if stage.raters is not None and nobody:
        raise InputError(
            f"{stage.name}: sample {prompt.unrated[0]}: no text token follows its first image, so no rater can judge "
            "the vision tokens; put the question after the image, or use a recipe without raters"
        )
    readers = [part.title for part in stage.parts if part.reads.grid]
    for row, cause in enumerate(prompt.causes):
        if readers and cause is not None:
            raise InputError(
                f"{stage.name}: {' and '.join(readers)} must know where vision tokens lie on the pictures, which "
                f"sample {row} does not tell: {cause}"
            )


def _followed(tokens: Tokens, gone: Tensor) -> StageResult:
    """What a stage inside the vision tower has left of `tokens`; as `Prefill.gone` has it."""
    at = tokens.origin.clamp(min=0)
    stays = (gone[..., 0].gather(1, at) < 0.5) & tokens.valid
    sizes = tuple(stays.sum(1).tolist())
    mass = gone[..., 1].gather(1, at)
    mass = torch.where(mass > 0, mass, 1.0)  # row separators of tiles come from no patch
    tokens = replace(tokens, mass=mass.masked_fill(~tokens.valid, 0.0))
    if sizes != tokens.sizes:
        tokens = tokens.take(ops.places(stays, sizes), sizes)
    return StageResult(tokens, tokens.origin[:, :0], None, False, None)
