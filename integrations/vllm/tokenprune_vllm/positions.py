"""Positions that ride beside the embeddings of survivors: pure tensors, nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 256
CHANNELS = 6
"""Columns behind an embedding: three positions, high digits and low digits of base 256. Whole numbers up to 256 are
exact in bfloat16, so positions up to 65535 are."""


def append(hidden: Tensor, position: Tensor) -> Tensor:
    """``[K, D]`` and ``[K, 3]`` int64 to ``[K, D + 6]``."""
    return torch.cat([hidden, (position // BASE).to(hidden.dtype), (position % BASE).to(hidden.dtype)], dim=1)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `append`."""
    high, low = rows[:, -CHANNELS:-3].round().long(), rows[:, -3:].round().long()
    return rows[:, :-CHANNELS], high * BASE + low


def written(positions: Tensor, media: Tensor, base: Tensor, offsets: Sequence[Tensor], start: int) -> Tensor:
    """Positions ``[3, L]`` of a prompt with those of the survivors of this chunk filled in.

    Counts and shapes are known from the start, so text was right from the start, and survivors alone change.

    Args:
        positions: as they are.
        media: ``[L]`` bool, placeholders.
        base: ``[L]`` int64, for each placeholder the position that its picture begins at.
        offsets: ``[k, 3]`` of the survivors that this chunk brings, picture by picture.
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


def one_axis_base(media: Tensor, total: int, kept: int) -> Tensor:
    """``[L]`` int64 for a model of one axis whose pictures all have `total` tokens, `kept` of them here: the position
    of a text token, and for a placeholder that of its picture's first original token."""
    rank = media.long().cumsum(0) - media.long()
    picture = rank // max(kept, 1)
    own = torch.arange(len(media), device=media.device) + picture * (total - kept)
    return torch.where(media, own - rank % max(kept, 1), own)
