"""Where the vision and text tokens of a prefill stand, and the `Tokens` record that its stages start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.models.adapter import Anatomy, VisionRow
from tokenprune.models.gather import take, take_positions, true_indices
from tokenprune.tokens import Grid, Tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """A forward that brings vision tokens, before any stage."""

    tokens: Tokens
    """All vision tokens; `hidden` is their input embedding, `slot` their index in this forward."""
    text: Tensor
    """``[B, T]`` index in this forward of the text tokens that may rate; 0 on padding."""
    real: Tensor
    """``[B, L]`` bool, False on the prompt's padding."""
    others: tuple[int, ...]
    """Tokens of the prompt that are neither vision tokens nor padding, of each sample."""
    raters: tuple[int, ...]
    """Of these, the ones behind the first image, which may rate."""


def read_prompt(
    anatomy: Anatomy,
    *,
    vision: Tensor,
    real: Tensor,
    embeddings: Tensor,
    positions: Tensor,
    limit: int,
    rated: bool,
) -> Prompt | None:
    """Locate the tokens of a forward; None when it brings no vision token. Waits for the device, to count and locate.

    Args:
        vision: ``[B, L]`` bool, vision tokens.
        real: ``[B, L]`` bool, False on padding.
        embeddings: ``[B, L, D]`` input of the language model, vision features merged in.
        positions: position ids ``[1 or B, L]`` or ``[3, 1 or B, L]``.
        limit: tokens of this forward that belong to the prompt; later ones (candidates, re-read answers) never rate.
        rated: whether a stage needs raters.

    Raises:
        InputError: no text token follows the first image of a sample, and raters are needed.
    """
    vision = vision & real
    after_image = vision.cumsum(1) > 0
    in_prompt = torch.arange(vision.shape[1], device=vision.device) < limit
    text = real & ~vision & after_image & in_prompt
    others = real & ~vision & in_prompt
    counts: list[list[int]] = torch.stack([vision.sum(1), text.sum(1), others.sum(1)]).tolist()
    total, texts = tuple(counts[0]), counts[1]
    if not any(total):
        return None
    for row, (images, words) in enumerate(zip(total, texts, strict=True)):
        if rated and images and not words:
            raise InputError(
                f"sample {row}: no text token follows its first image, so no rater can judge the vision tokens; "
                "put the question after the image, or use a recipe without raters"
            )
    slot = true_indices(vision, max(total), pad="right")
    valid, at = slot >= 0, slot.clamp(min=0)
    if positions.dim() == 3:
        position = take_positions(positions.expand(3, *vision.shape), at)
    else:
        position = take_positions(positions.expand(*vision.shape), at)
    hidden = take(embeddings, at, 1)
    grids = _grids(anatomy, vision, total, hidden, position)
    text_slot = true_indices(text, max(texts), pad="right")
    index = torch.arange(max(total), device=vision.device).expand_as(slot)
    tokens = Tokens(
        hidden=hidden,
        valid=valid,
        origin=index.masked_fill(~valid, -1),
        slot=at,
        cell=_cells(grids, max(total)).to(vision.device),
        position=position,
        mass=valid.float(),
        text=take(embeddings, text_slot.clamp(min=0), 1),
        text_valid=text_slot >= 0,
        sizes=total,
        total=total,
        grids=grids,
        aux={"vision_embedding": hidden, "vision_embedding_valid": valid},
    )
    return Prompt(tokens, text_slot.clamp(min=0), real, tuple(counts[2]), tuple(texts))


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
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        return seen.expand(batch, -1)
    raise InputError(f"attention_mask: expected 2 or 4 dimensions, got shape {tuple(mask.shape)}")


def _grids(
    anatomy: Anatomy, vision: Tensor, total: Sequence[int], hidden: Tensor, position: Tensor
) -> tuple[tuple[Grid, ...], ...]:
    runs = _runs(vision)
    name = anatomy.adapter.newline
    newline: list[list[bool]] | None = None
    if name is not None:
        separator = getattr(anatomy.base, name).to(hidden.device, hidden.dtype)
        newline = (hidden == separator).all(-1).tolist()
    ids = position.cpu() if position.dim() == 3 else None
    grids = []
    for row, n in enumerate(total):
        info = VisionRow(
            runs=runs[row],
            positions=None if ids is None else ids[:, row, :n],
            newline=None if newline is None else tuple(newline[row][:n]),
        )
        grids.append(anatomy.adapter.grids(anatomy.base, info) if n else ())
    return tuple(grids)


def _runs(vision: Tensor) -> list[tuple[int, ...]]:
    """Lengths of the uninterrupted runs of True in each row."""
    edge = torch.nn.functional.pad(vision.int(), (1, 1)).diff(dim=1).cpu()
    return [tuple(((row == -1).nonzero().flatten() - (row == 1).nonzero().flatten()).tolist()) for row in edge]


def _cells(grids: Sequence[Sequence[Grid]], n: int) -> Tensor:
    """``[B, n, 3]`` image or frame, row and column of every vision token; 0 on padding."""
    rows = []
    for images in grids:
        frame, parts = 0, [torch.zeros(0, 3, dtype=torch.long)]
        for t, h, w in images:
            cells = torch.cartesian_prod(torch.arange(frame, frame + t), torch.arange(h), torch.arange(w))
            parts.append(cells)
            frame += t
        cell = torch.cat(parts)
        rows.append(torch.nn.functional.pad(cell, (0, 0, 0, n - cell.shape[0])))
    return torch.stack(rows)
