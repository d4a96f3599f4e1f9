"""Where the vision and text tokens of a prefill stand, read with one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.signals import Question, Signal, Signals
from tokenprune.core.tokens import Grid, Tokens
from tokenprune.engine.gather import take, take_positions
from tokenprune.engine.prompt import Prompt
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.adapter import VisionRow
from tokenprune.families.anatomy import Anatomy


def start_reading(
    anatomy: Anatomy,
    *,
    vision: Tensor,
    real: Tensor,
    embeddings: Tensor,
    positions: Tensor,
    pixels: tuple[int, int] | None,
    limit: int,
    rated: bool,
) -> Callable[[], Prompt | None]:
    """Start to locate the tokens of a forward; call what is returned for them, or None if none is a vision token.

    The host waits for the device once: kinds and positions of all tokens come together, and nothing later does. Between
    the two calls the device may be given other work, which then runs while the host is busy with this.

    Args:
        vision: ``[B, L]`` bool, vision tokens.
        real: ``[B, L]`` bool, False on padding.
        embeddings: ``[B, L, D]`` input of the language model, vision features merged in.
        positions: position ids ``[1 or B, L]`` or ``[3, 1 or B, L]``.
        pixels: height and width of each picture, where the model was given pictures of one size.
        limit: tokens of this forward that belong to the prompt; later ones (candidates, re-read answers) never rate.
        rated: whether a stage needs raters.

    Raises:
        InputError: in the second call, if no text token follows the first image of a sample, and raters are needed.
    """
    look = _look(anatomy, vision, real, embeddings, positions)
    return lambda: _prompt(anatomy, look(), embeddings, positions, real, pixels=pixels, limit=limit, rated=rated)


def _prompt(
    anatomy: Anatomy,
    seen: _Seen,
    embeddings: Tensor,
    positions: Tensor,
    real: Tensor,
    *,
    pixels: tuple[int, int] | None,
    limit: int,
    rated: bool,
) -> Prompt | None:
    """As in `start_reading`."""
    device, (batch, length) = real.device, seen.real.shape
    total = _counts(seen.vision)
    if not any(total):
        return None
    others = seen.real & ~seen.vision
    others[:, limit:] = False
    after_image = others & (seen.vision.cumsum(1, dtype=np.int64) > 0)
    texts = _counts(after_image)
    for row, (images, words) in enumerate(zip(total, texts, strict=True)):
        if rated and images and not words:
            raise InputError(
                f"sample {row}: no text token follows its first image, so no rater can judge the vision tokens; "
                "put the question after the image, or use a recipe without raters"
            )
    slot = transfer.upload(_places(seen.vision, max(total)), device)
    valid, at = slot >= 0, slot.clamp(min=0)
    if positions.dim() == 3:
        position = take_positions(positions.expand(3, batch, length), at)
    else:
        position = take_positions(positions.expand(batch, length), at)
    hidden = take(embeddings, at, 1)
    grids = tuple(_grids(anatomy, seen, pixels, row) if n else () for row, n in enumerate(total))
    text_slot = transfer.upload(_places(after_image, max(texts)), device)
    index = torch.arange(max(total), device=device).expand_as(slot)
    tokens = Tokens(
        hidden=hidden,
        valid=valid,
        origin=index.masked_fill(~valid, -1),
        slot=at,
        cell=transfer.upload(_cells(grids, max(total)), device),
        position=position,
        mass=valid.float(),
        question=Question(
            take(embeddings, text_slot.clamp(min=0), 1), text_slot >= 0, ops.ragged(texts), text_slot.clamp(min=0)
        ),
        sizes=total,
        total=total,
        grids=grids,
        signals=Signals({"embedding": Signal(hidden, valid if ops.ragged(total) else None)}),
    )
    return Prompt(
        tokens=tokens,
        text=text_slot.clamp(min=0),
        real=None if seen.real.all() else real,
        counts_up=_counts_up(seen),
        others=_counts(others),
        raters=texts,
    )


def vision_tokens(anatomy: Anatomy, input_ids: Tensor | None, embeddings: Tensor) -> Tensor:
    """``[B, L]`` bool: which tokens of a forward are vision tokens, by ids ``[B, L]`` or embeddings ``[B, L, D]``.

    Raises:
        UnsupportedModelError: the ids are not those of the embeddings.
    """
    if input_ids is not None and input_ids.shape[1] != embeddings.shape[1]:
        raise UnsupportedModelError(
            f"{input_ids.shape[1]} input ids but {embeddings.shape[1]} embeddings reached the language model "
            "(prefix tuning?): vision tokens cannot be located"
        )
    return anatomy.vision_mask(input_ids, embeddings)


def real_tokens(mask: Any, batch: int, length: int, device: torch.device, past: int) -> Tensor:
    """``[B, L]`` bool: which tokens of this forward are no padding, from whatever mask the model was called with."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.dim() == 2:
        return mask[:, -length:].bool().to(device).expand(batch, -1)
    if mask.dim() == 4:
        # The last query of a causal mask sees every real token.
        last = mask[:, 0, -1, past : past + length].to(device)
        return ops.is_shown(last).expand(batch, -1)
    raise InputError(f"attention_mask: expected 2 or 4 dimensions, got shape {tuple(mask.shape)}")


def position_ids(ids: Tensor | None, past: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Position ids as the text model uses them: ``[1 or B, L]``, or three axes (a leading text axis is left out)."""
    if ids is None:
        return (torch.arange(length, device=device) + past)[None]
    if ids.dim() == 3 and ids.shape[0] == 4:
        return ids[1:]
    return ids


@dataclass(frozen=True)
class _Seen:
    """One forward's tokens on the host; all ``[B, L]`` but positions, ``[1 or 3, B, L]``."""

    vision: np.ndarray
    real: np.ndarray
    newline: np.ndarray | None
    positions: np.ndarray


def _look(anatomy: Anatomy, vision: Tensor, real: Tensor, embeddings: Tensor, positions: Tensor) -> Callable[[], _Seen]:
    """The one transfer of a prefill, started; the second call waits for it."""
    rows = [vision & real, real]
    name = anatomy.adapter.newline
    if name is not None:
        separator = getattr(anatomy.base, name).to(embeddings.device, embeddings.dtype)
        rows.append((embeddings == separator).all(-1))
    axes = positions.shape[0] if positions.dim() == 3 else 1
    rows += list(positions.expand(axes, *vision.shape))
    copied = transfer.download(torch.stack([row.to(vision.device, torch.int64) for row in rows]))

    def seen() -> _Seen:
        host = copied().numpy()
        return _Seen(
            vision=host[0] > 0,
            real=host[1] > 0,
            newline=None if name is None else host[2] > 0,
            positions=host[-axes:],
        )

    return seen


def _counts_up(seen: _Seen) -> bool:
    """As `Prompt.counts_up`."""
    real, steps = seen.real, np.diff(seen.positions)
    return bool((real[:, 1:] >= real[:, :-1]).all() and (steps == 1)[:, real[:, :-1]].all())


def _counts(mask: np.ndarray) -> tuple[int, ...]:
    """True entries of each row."""
    return tuple(mask.sum(1).tolist())


def _places(mask: np.ndarray, most: int) -> Tensor:
    """As `ops.places`, on the host."""
    index = np.full((mask.shape[0], most), -1, dtype=np.int64)
    for row, own in zip(index, mask, strict=True):
        places = np.flatnonzero(own)
        row[: len(places)] = places
    return torch.from_numpy(index)


def _grids(anatomy: Anatomy, seen: _Seen, pixels: tuple[int, int] | None, row: int) -> tuple[Grid, ...]:
    own = seen.vision[row]
    at = np.flatnonzero(own)
    breaks = [0, *(np.flatnonzero(at[1:] - at[:-1] > 1) + 1).tolist(), len(at)]
    info = VisionRow(
        runs=tuple(end - start for start, end in pairwise(breaks)),
        positions=seen.positions[:, row, own] if len(seen.positions) == 3 else None,
        newline=None if seen.newline is None else tuple(seen.newline[row, own].tolist()),
        pixels=pixels,
    )
    return anatomy.adapter.grids(anatomy.base, info)


def _cells(grids: Sequence[Sequence[Grid]], n: int) -> Tensor:
    """``[B, n, 3]`` image or frame, row and column of every vision token; 0 on padding. On the host."""
    cells = np.zeros((len(grids), n, 3), dtype=np.int64)
    for row, images in enumerate(grids):
        if row and images == grids[row - 1]:
            cells[row] = cells[row - 1]
            continue
        frame, at = 0, 0
        for grid in images:
            size = prod(grid)
            own = cells[row, at : at + size]
            own[:] = np.stack(np.unravel_index(np.arange(size), grid), axis=-1)
            own[:, 0] += frame
            frame, at = frame + grid[0], at + size
    return torch.from_numpy(cells)
