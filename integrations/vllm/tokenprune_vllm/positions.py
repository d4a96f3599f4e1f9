"""Positions that ride beside the embeddings of survivors: pure tensors, nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 256
"""Columns behind an embedding: high digits of its positions, then low digits. Whole numbers up to 256 are exact in
bfloat16, so positions up to 65535 are."""


def append(hidden: Tensor, position: Tensor) -> Tensor:
    """``[K, D]`` and ``[K, axes]`` int64 to ``[K, D + 2 axes]``."""
    return torch.cat([hidden, (position // BASE).to(hidden.dtype), (position % BASE).to(hidden.dtype)], dim=1)


def split(rows: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """The inverse of `append`."""
    high, low = rows[:, -2 * axes : -axes].round().long(), rows[:, -axes:].round().long()
    return rows[:, : -2 * axes], high * BASE + low


def written(positions: Tensor, media: Tensor, base: Tensor, offsets: Sequence[Tensor], start: int) -> Tensor:
    """Positions ``[axes, L]`` of a prompt with those of the survivors of this chunk filled in.

    Counts and shapes are known from the start, so text was right from the start, and survivors alone change. A prompt
    that is computed anew gets the same once more.

    Args:
        positions: as they are.
        media: ``[L]`` bool, placeholders.
        base: ``[L]`` int64, for each placeholder the position that its picture begins at.
        offsets: ``[k, axes]`` of the survivors that this chunk brings, picture by picture.
        start: tokens of the prompt that have been computed before.
    """
    slots = media.nonzero()[:, 0]
    slots = slots[slots >= start]
    new, at = positions.clone(), 0
    for each in offsets:
        here = slots[at : at + len(each)]
        new[:, here] = (each.to(base.device) + base[here][:, None]).T.to(new)
        at += len(each)
    return new


def one_axis(length: int, pictures: Sequence[tuple[int, int, int]]) -> Tensor:
    """``[3, L]`` int64 of a prompt to a model that counts along one axis.

    The first axis turns the heads: text as in the untouched prompt, placeholders where their picture begins, until
    `written` says where each survivor stood. The other two turn nothing, and remember, as long as the request lives:
    where the picture of a placeholder begins, and where the text behind the prompt goes on.

    Args:
        length: L, tokens of the prompt.
        pictures: in order, the first placeholder, the placeholders, and the tokens of the untouched picture.
    """
    positions = torch.arange(length).repeat(3, 1)
    ahead = 0
    for start, kept, total in pictures:
        positions[:2, start : start + kept] = positions[0, start].item()
        positions[0, start + kept :] += total - kept
        ahead += total - kept
    positions[2] = length + ahead
    return positions
