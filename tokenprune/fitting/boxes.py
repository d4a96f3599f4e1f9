"""`BoxesObjective`: scores learn which tokens a box around what is asked for touches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.core.frames import frames_of
from tokenprune.core.grids import Grid
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.families.chat import Chat
from tokenprune.fitting.objectives import Prompts, run_probes, scoring
from tokenprune.fitting.plan import Plan
from tokenprune.fitting.soft import Probe
from tokenprune.stage import Stage
from tokenprune.study.cases import Box

SMOOTH = 1e-6
"""Added above and below in the dice loss: no division by 0."""
CROSS_ENTROPY = 0.1
"""Weight of the cross-entropy of single tokens beside the dice loss, as GlimpsePrune's."""


class BoxesObjective:
    """Scores of the learned stages learn to be above 0 on tokens that a question's box touches, and below 0 elsewhere.

    A dice loss of each sample, and a tenth of the cross-entropy of its tokens (GlimpsePrune, arXiv:2508.01548). The
    model runs forward only. How many tokens are kept, boxes teach: a threshold's expected share is not asked.

    Raises:
        InputError: a learned part that is no scorer: boxes tell nothing about it.
    """

    def __init__(self, chat: Chat, stages: Sequence[Stage], plan: Plan) -> None:
        self._chat = chat
        self._stages = scoring(stages, "boxes")

    def loss(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        seen: list[tuple[Stage, Tokens, Tensor | None]] = []
        probes = [
            Probe(stage, lambda tokens, weights, stage=stage: seen.append((stage, tokens, weights)))  # type: ignore[misc]
            for stage in self._stages
        ]
        report = run_probes(self._chat, probes, prompts)
        losses = []
        for stage, tokens, weights in seen:
            wanted = touched(report.grids, prompts.boxes, tokens.valid.shape[1]).to(tokens.valid.device)
            losses.append(box_loss(stage.scorer(tokens, weights), wanted, tokens.valid))
        return torch.stack(losses).mean()


def touched(grids: Sequence[Sequence[Grid]], boxes: Sequence[Box | None], most: int) -> Tensor:
    """``[B, most]`` 1.0 on the vision tokens whose cell overlaps the box of their sample, one picture a sample.

    Args:
        grids: (T, H, W) of the pictures of each sample.
        boxes: left, top, right and bottom of each, as shares of the picture's sides.
        most: vision tokens of the largest sample.

    Raises:
        InputError: a sample without a box, or nothing tells where its tokens lie.
    """
    wanted = torch.zeros(len(grids), most)
    for row, own in enumerate(grids):
        box = boxes[row] if row < len(boxes) else None
        if box is None:
            raise InputError(f"aim boxes: sample {row} has no box")
        for frame in frames_of(own, 1, asker="aim boxes"):
            down, right = map(torch.from_numpy, frame.under(box).nonzero())
            wanted[row, frame.start + down * frame.columns + right] = 1.0
    return wanted


def box_loss(scores: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Dice loss of each sample's scores as logits, and a share of their cross-entropy; mean over samples.

    Args:
        scores: ``[B, N]``, anything on padding.
        wanted: ``[B, N]``, 1.0 or 0.0.
        valid: ``[B, N]`` bool, False on padding.
    """
    scores = scores.masked_fill(~valid, 0.0)
    there = scores.sigmoid() * valid
    dice = 1 - (2 * (there * wanted).sum(1) + SMOOTH) / (there.sum(1) + wanted.sum(1) + SMOOTH)
    each = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * valid
    return (dice + CROSS_ENTROPY * each.sum(1) / valid.sum(1).clamp(min=1)).mean()
