"""Where the vision and text tokens of a prefill stand, read with one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.grids import cells_of
from tokenprune.core.signals import Question, Signal, Signals, Unreadable
from tokenprune.core.tokens import Tokens
from tokenprune.engine.gather import take, take_positions
from tokenprune.engine.grids import grids_of
from tokenprune.engine.prompt import Prompt
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import VIDEO, Anatomy, Pictures


def start_reading(
    anatomy: Anatomy,
    *,
    vision: Tensor,
    real: Tensor,
    embeddings: Tensor,
    positions: Tensor,
    pictures: Pictures,
    limit: int,
    rated: bool,
    placed: bool,
    ends: bool = False,
) -> Callable[[], Prompt | None]:
    """Start to locate the tokens of a forward; call what is returned for them, or None if none is a vision token.

    The host waits for the device once: kinds and positions of all tokens come together, and nothing later does. Between
    the two calls the device may be given other work, which then runs while the host is busy with this.

    Args:
        vision: ``[B, L]``, 0 on text, on vision tokens their kind (`Anatomy.vision_kinds`).
        real: ``[B, L]`` bool, False on padding.
        embeddings: ``[B, L, D]`` input of the language model, vision features merged in.
        positions: position ids ``[1 or B, L]`` or ``[3, 1 or B, L]``.
        pictures: what the call has told about them.
        limit: tokens of this forward that belong to the prompt; later ones (candidates, re-read answers) never rate.
        rated: whether a stage needs raters.
        placed: whether a part reads where tokens lie on the pictures.
        ends: whether a part reads where the prompt ends.
    """
    look = _look(anatomy, vision, real, embeddings, positions, pictures.sizes)
    pixels = pictures.pixels
    return lambda: _prompt(
        anatomy, look(), embeddings, positions, real, pixels=pixels, limit=limit, rated=rated, placed=placed, ends=ends
    )


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
    placed: bool,
    ends: bool,
) -> Prompt | None:
    """As in `start_reading`."""
    device, (batch, length) = real.device, seen.real.shape
    vision = seen.vision & seen.real
    total = _counts(vision)
    if not any(total):
        return None
    others = seen.real & ~seen.vision
    others[:, limit:] = False
    after_image = others & (vision.cumsum(1, dtype=np.int64) > 0)
    unrated = _unrated(total, after_image) if rated else ()
    for row in unrated:
        own = np.flatnonzero(seen.real[row])
        after_image[row, own[own < max(limit, own[0] + 1)][-1]] = True
    texts = _counts(after_image)
    slot = transfer.upload(_places(vision, max(total)), device)
    valid, at = slot >= 0, slot.clamp(min=0)
    if positions.dim() == 3:
        position = take_positions(positions.expand(3, batch, length), at)
    else:
        position = take_positions(positions.expand(batch, length), at)
    hidden = take(embeddings, at, 1)
    grids, causes = grids_of(
        anatomy,
        vision=seen.vision,
        video=seen.video,
        real=seen.real,
        positions=seen.positions,
        newline=seen.newline,
        pixels=pixels,
        sizes=seen.sizes,
    )
    # Parts that declare grids meet this in stages that keep everything; `planned` refuses the others.
    cause = next(filter(None, causes), None)
    unknown: Any = Unreadable(f"where vision tokens lie on the pictures is not known: {cause}")
    text_slot = transfer.upload(_places(after_image, max(texts)), device)
    index = torch.arange(max(total), device=device).expand_as(slot)
    tokens = Tokens(
        hidden=hidden,
        valid=valid,
        origin=index.masked_fill(~valid, -1),
        slot=at,
        cell=transfer.upload(cells_of(grids, max(total)), device) if placed and not any(causes) else unknown,
        position=position,
        mass=valid.float(),
        question=Question(
            take(embeddings, text_slot.clamp(min=0), 1), text_slot >= 0, ops.ragged(texts), text_slot.clamp(min=0)
        ),
        sizes=total,
        total=total,
        grids=tuple(own if why is None else unknown for own, why in zip(grids, causes, strict=True)),
        signals=Signals({"embedding": Signal(hidden, valid if ops.ragged(total) else None)}),
    )
    return Prompt(
        tokens=tokens,
        text=text_slot.clamp(min=0),
        real=None if seen.real.all() else real,
        counts_up=_counts_up(seen),
        others=_counts(others),
        raters=texts,
        unrated=unrated,
        grids=grids,
        causes=causes,
        last=transfer.upload(_last(seen.real, limit), device) if ends else None,
    )


def _last(real: np.ndarray, limit: int) -> Tensor:
    """``[B, 1]`` index of the last token that is no padding and stands before `limit`; 0 in a row without any."""
    index = np.where(real[:, :limit], np.arange(real[:, :limit].shape[1]), 0)
    return torch.from_numpy(index.max(1, keepdims=True).astype(np.int64))


def _unrated(total: Sequence[int], after_image: np.ndarray) -> tuple[int, ...]:
    """The samples with vision tokens and no text token behind them that may rate."""
    return tuple(row for row, n in enumerate(total) if n and not after_image[row].any())


def vision_tokens(anatomy: Anatomy, input_ids: Tensor | None, embeddings: Tensor) -> Tensor:
    """``[B, L]`` int8: kinds of the vision tokens of a forward, by ids ``[B, L]`` or embeddings ``[B, L, D]``.

    Raises:
        UnsupportedModelError: the ids are not those of the embeddings.
    """
    if input_ids is not None and input_ids.shape[1] != embeddings.shape[1]:
        raise UnsupportedModelError(
            f"{input_ids.shape[1]} input ids but {embeddings.shape[1]} embeddings reached the language model "
            "(prefix tuning?): vision tokens cannot be located"
        )
    return anatomy.vision_kinds(input_ids, embeddings)


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
    """Placeholders of vision tokens, those that the attention mask hides included."""
    video: np.ndarray
    """Those of them that stand for a video."""
    real: np.ndarray
    newline: np.ndarray | None
    positions: np.ndarray
    sizes: np.ndarray | None
    """``[pictures, 2 or 3]``, as `Adapter.sizes` names them; None where it was not given."""


def _look(
    anatomy: Anatomy, vision: Tensor, real: Tensor, embeddings: Tensor, positions: Tensor, sizes: Tensor | None
) -> Callable[[], _Seen]:
    """The one transfer of a prefill, started; the second call waits for it."""
    rows = [vision, real]
    name = anatomy.adapter.newline
    if name is not None:
        separator = getattr(anatomy.base, name).to(embeddings.device, embeddings.dtype)
        rows.append(_alike(embeddings, separator))
    axes = positions.shape[0] if positions.dim() == 3 else 1
    rows += list(positions.expand(axes, *vision.shape))
    table = torch.stack([row.to(vision.device, torch.int64) for row in rows]).flatten()
    away = sizes is not None and sizes.device.type != "cpu"  # processors leave them on the host
    if sizes is not None and away:
        table = torch.cat([table, sizes.to(vision.device, torch.int64).flatten()])
    copied = transfer.download(table)

    def seen() -> _Seen:
        flat = copied().numpy()
        length = len(rows) * vision.numel()
        host = flat[:length].reshape(len(rows), *vision.shape)
        known = None if sizes is None else flat[length:].reshape(tuple(sizes.shape)) if away else sizes.numpy()
        return _Seen(
            vision=host[0] > 0,
            video=host[0] == VIDEO,
            real=host[1] > 0,
            newline=None if name is None else host[2] > 0,
            positions=host[-axes:],
            sizes=known,
        )

    return seen


def _alike(embeddings: Tensor, separator: Tensor) -> Tensor:
    """``[B, L]`` bool: which of `embeddings` ``[B, L, D]`` are the `separator` ``[D]``.

    In a float32 model under autocast, features are made in half precision, and their separators rounded with them.
    """
    alike = (embeddings == separator).all(-1)
    if embeddings.dtype == torch.float32:
        for half in (torch.bfloat16, torch.float16):
            alike |= (embeddings == separator.to(half).float()).all(-1)
    return alike


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
