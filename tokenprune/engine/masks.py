"""From a mask in original coordinates to the mask of a pruned layer, and the rows of it that raters need."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tokenprune.engine.cache import Slots
from tokenprune.engine.gather import take

Mask = Tensor | BlockMask
"""What transformers builds: see `reduce_mask`."""


def past_slots(slots: Slots | None, past: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Original index ``[B, m]`` of every token a layer stored before this forward, and which are real (None: all)."""
    if slots is None:
        return torch.arange(past, device=device).expand(batch, -1), None
    slots = slots.cropped(past)
    tail = torch.arange(slots.tail, past, device=device).expand(batch, -1)
    origin = slots.origin.to(device).expand(batch, -1)
    if slots.valid is None:
        return torch.cat([origin, tail], dim=1), None
    valid = slots.valid.to(device)
    return torch.cat([origin, tail], dim=1), torch.cat([valid, torch.ones_like(tail, dtype=torch.bool)], dim=1)


def join_valid(first: Tensor | None, second: Tensor | None, m: int, n: int) -> Tensor | None:
    """Concatenate validity masks ``[B, m]`` and ``[B, n]``, where None means all True."""
    if first is None and second is None:
        return None
    known = first if first is not None else second
    assert known is not None
    ones = known.new_ones
    first = ones(known.shape[0], m) if first is None else first
    second = ones(known.shape[0], n) if second is None else second.to(first.device)
    return torch.cat([first, second], dim=1)


def reduce_mask(
    mask: Mask | None,
    *,
    rows: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    flash: bool,
) -> Mask | None:
    """The mask of a pruned layer.

    Args:
        mask: what transformers built: None (plain causal), a padding mask ``[B, K0]``, ``[B, 1, Q0, K0]`` (bool,
            True = visible; or float, added to the logits), or a function of indices (flex attention). All in original
            coordinates.
        rows: ``[B, Q]`` index of the surviving queries within this forward, None when all survive.
        queries: ``[B, Q]`` original index of the queries.
        keys: ``[B, K]`` original index of each key as the layer stores it.
        valid: ``[B, K]`` bool, False on padding slots; None without.
        flash: the kernel is causal by itself and takes padding masks only.

    Returns:
        The same kind of mask over the queries and keys at hand; None stays None unless padding slots must be hidden.
    """
    if mask is None:
        if valid is None or flash:
            return valid
        return (keys[:, None, None, :] <= queries[:, None, :, None]) & valid[:, None, None, :]
    width = mask.shape[-1]
    visible = keys < width
    if valid is not None:
        visible = visible & valid
    columns = keys.clamp(max=width - 1)
    if isinstance(mask, BlockMask):
        return _reduce_block_mask(mask, rows, queries, columns, visible)
    if mask.dim() == 2:
        return take(mask, columns, 1) * visible.to(mask.dtype)
    if rows is not None:
        mask = take(mask, rows, 2)
    mask = take(mask, columns, 3)
    hidden = ~visible[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _reduce_block_mask(mask: BlockMask, rows: Tensor | None, queries: Tensor, columns: Tensor, visible: Tensor) -> Mask:
    """`reduce_mask` for flex attention: the same function, of the original indices."""
    allowed = mask.mask_mod

    def left(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = q if rows is None else rows[b, q]
        return allowed(b, h, row, columns[b, k]) & visible[b, k]

    (batch, n), length = columns.shape, queries.shape[1]
    return create_block_mask(left, batch, None, length, n, device=str(columns.device))


def rater_rows(mask: Mask | None, text: Tensor, stored: int, length: int) -> Tensor:
    """Which of this forward's tokens each text token may attend to: ``[B, 1, T, L]`` bool.

    Args:
        mask: the layer's own mask, in the layer's coordinates; it hides padding slots too. None is plain causal.
        text: ``[B, T]`` index of the text tokens in the layer's sequence.
        stored: tokens of earlier forwards that stand before this forward's keys.
        length: L, tokens of this forward.
    """
    index = torch.arange(length, device=text.device)
    causal = (index <= text[..., None])[:, None]
    if mask is None:
        return causal
    if isinstance(mask, BlockMask):
        sample = torch.arange(text.shape[0], device=text.device).view(-1, 1, 1, 1)
        return mask.mask_mod(sample, torch.zeros_like(sample), text[:, None, :, None], index + stored)
    if mask.dim() == 2:
        return causal & mask[:, None, None, stored : stored + length].bool()
    rows = take(mask, text, 2)[..., stored : stored + length]
    return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
