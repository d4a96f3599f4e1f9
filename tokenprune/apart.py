"""Pictures of a prompt reduced each by itself, as engines do that encode one at a time (``pictures: apart``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor

from tokenprune.budget import Step, survivors
from tokenprune.core.grids import Grid, pictures_of
from tokenprune.core.result import StageResult
from tokenprune.core.signals import Question, Signal, Unreadable
from tokenprune.core.tokens import Tokens

Pictures = Literal["together", "apart"]
"""Whether the pictures of a prompt compete for one count, or each is reduced as if it were alone."""


@dataclass(frozen=True)
class Alone:
    """One picture of one sample, as it comes to a stage: plain numbers, known before anything has run."""

    row: int
    start: int
    """Index of its first token among those of its sample that are left."""
    size: int
    """Tokens of it that are left."""
    first: int
    """Its first token among the original ones of its sample."""
    frame: int
    """Frames of the pictures before it, which `Tokens.cell` counts through."""
    total: int
    grids: tuple[Grid, ...]
    count: int
    """Tokens that the stage keeps of it."""


def pictures_alone(
    steps: Sequence[Step],
    plan: Callable[[int, Sequence[Grid]], Sequence[int | None]],
    totals: Sequence[int],
    grids: Sequence[Sequence[Grid]],
) -> tuple[tuple[Alone, ...], ...]:
    """For each stage, all pictures of a batch as they come to it.

    Args:
        steps: the stages.
        plan: how many tokens each keeps of a picture, from its tokens and grids; all are known.
        totals: original vision tokens of each sample.
        grids: (T, H, W) of the images of each.
    """
    stages: list[list[Alone]] = [[] for _ in steps]
    for row, (whole, own) in enumerate(zip(totals, grids, strict=True)):
        first, frame, starts = 0, 0, [0] * len(steps)
        for picture in pictures_of(own) if whole else ():
            total = sum(map(prod, picture))
            counts = cast("Sequence[int]", plan(total, picture))
            sizes = (total, *survivors(steps, counts, total))
            for number, count in enumerate(counts):
                size = sizes[number]
                stages[number].append(Alone(row, starts[number], size, first, frame, total, picture, count))
                starts[number] += size
            first, frame = first + total, frame + sum(grid[0] for grid in picture)
    return tuple(map(tuple, stages))


def run_apart(stage: Callable[[Tokens, int], StageResult], tokens: Tokens, pictures: Sequence[Alone]) -> StageResult:
    """What `stage` makes of each picture by itself, put together again.

    Args:
        stage: one stage, from tokens and how many of them to keep.
        tokens: of all samples.
        pictures: of all samples, in order; they hold all tokens.
    """
    results = [stage(_of_picture(tokens, picture), picture.count) for picture in pictures]
    own = [
        [(picture, result) for picture, result in zip(pictures, results, strict=True) if picture.row == row]
        for row in range(len(tokens.sizes))
    ]
    sizes = tuple(sum(result.tokens.sizes[0] for _, result in each) for each in own)
    # A merged token has the origin of its anchor: every token that is left stands somewhere among those that came.
    places = [[_places(tokens, picture, result.tokens) for picture, result in each] for each in own]
    left = tokens.take(_padded(places, tokens.origin, -1), sizes)
    written = [_written([result for _, result in each]) for each in own]
    changed = any(result.written is not None for result in results)
    if changed:
        hidden = [[result.tokens.hidden[0] for _, result in each] for each in own]
        mass = [[result.tokens.mass[0] for _, result in each] for each in own]
        left = replace(left, hidden=_padded(hidden, tokens.hidden, 0), mass=_padded(mass, tokens.mass, 0))
    scores = [[_scores(picture, result) for picture, result in each] for each in own]
    return StageResult(
        tokens=left,
        merged=_padded([[r.merged[0] + p.first for p, r in each] for each in own], tokens.origin, -1),
        written=_padded(written, tokens.origin, -1) if changed else None,
        written_padded=changed,
        scores=_padded(scores, tokens.mass, -torch.inf) if any(r.scores is not None for r in results) else None,
    )


def _of_picture(tokens: Tokens, picture: Alone) -> Tokens:
    """Its tokens, as those of a prompt of one picture."""
    row, here = slice(picture.row, picture.row + 1), slice(picture.start, picture.start + picture.size)
    originals = slice(picture.first, picture.first + picture.total)

    def signal(name: str) -> Signal:
        whole = tokens.original(name)
        if whole.origin is None:
            return Signal(whole.value[row, originals])
        mine = (whole.origin[picture.row] >= picture.first) & (whole.origin[picture.row] < originals.stop)
        return Signal(whole.value[row][:, mine], origin=whole.origin[row][:, mine] - picture.first)

    cell, question = tokens.cell, tokens.question
    if not isinstance(cell, Unreadable):
        cell = cell[row, here] - torch.tensor([picture.frame, 0, 0], device=cell.device)
    if isinstance(question, Question):
        question = question.of(row)
    return replace(
        tokens,
        hidden=tokens.hidden[row, here],
        valid=tokens.valid[row, here],
        origin=tokens.origin[row, here] - picture.first,
        slot=tokens.slot[row, here],
        cell=cell,
        position=tokens.position[..., row, here],
        mass=tokens.mass[row, here],
        question=question,
        sizes=(picture.size,),
        total=(picture.total,),
        grids=(picture.grids,),
        signals=tokens.signals.mapped(signal),
    )


def _places(tokens: Tokens, picture: Alone, left: Tokens) -> Tensor:
    """``[K]`` where its tokens that are left stand among those of its sample that came in."""
    came = tokens.origin[picture.row, picture.start : picture.start + picture.size].contiguous()
    return torch.searchsorted(came, left.origin[0] + picture.first) + picture.start


def _written(results: Sequence[StageResult]) -> list[Tensor]:
    """Which tokens of a sample have a new state, picture by picture."""
    found, before = [], 0
    for result in results:
        if result.written is not None:
            index = result.written[0]
            found.append(index[index >= 0] + before if result.written_padded else index + before)
        before += result.tokens.sizes[0]
    return found


def _scores(picture: Alone, result: StageResult) -> Tensor:
    """``[n]`` float32; of a picture that is kept whole, which nobody has scored, not a number."""
    if result.scores is None:
        return torch.full((picture.size,), torch.nan, device=result.tokens.hidden.device)
    return result.scores[0]


def _padded(rows: Sequence[Sequence[Tensor]], like: Tensor, fill: float) -> Tensor:
    """``[B, most, ...]`` of the pieces of each sample, padded on the right; `like` has their kind and width."""
    whole = [torch.cat(list(pieces)) if pieces else like.new_zeros(0, *like.shape[2:]) for pieces in rows]
    return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=fill)
