"""From a mask in original coordinates to the mask of a pruned layer, and the rows of it that raters need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tokenprune.core import ops
from tokenprune.engine.cache_layers import Slots
from tokenprune.engine.gather import take
from tokenprune.errors import UnsupportedModelError

Mask = Tensor | BlockMask
"""What transformers builds: see `reduce_mask`."""


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys that a layer's attention reads, in the order in which the layer stores them."""

    origin: Tensor
    """``[B, K]`` index of each key's token in the untouched sequence."""
    valid: Tensor | None = None
    """``[B, K]`` bool, False on padding slots; None without."""
    bias: Tensor | None = None
    """``[B, K]`` float32, added to the logits of every query with this key; None: nothing is."""

    def last(self, count: int) -> Keys:
        """The last `count` of these keys."""
        if count >= self.origin.shape[1]:
            return self
        valid, bias = (None if x is None else x[:, -count:] for x in (self.valid, self.bias))
        return Keys(self.origin[:, -count:], valid, bias)

    def then(self, origin: Tensor, valid: Tensor | None = None, bias: Tensor | None = None) -> Keys:
        """These keys and more of them behind: arguments as the fields."""
        sides = self.origin.shape[1], origin.shape[1]
        return Keys(
            torch.cat([self.origin, origin], dim=1),
            _joined(self.valid, valid, sides, True),
            _joined(self.bias, bias, sides, 0.0),
        )


def stored_keys(slots: Slots | None, past: int, batch: int, device: torch.device) -> Keys:
    """The keys that a layer stored in earlier forwards of `past` tokens in all."""
    if slots is None:
        return Keys(torch.arange(past, device=device).expand(batch, -1))
    slots = slots.cropped(past)
    valid, bias = (None if x is None else x.to(device) for x in (slots.valid, slots.bias))
    known = Keys(slots.origin.to(device).expand(batch, -1), valid, bias)
    return known.then(torch.arange(slots.tail, past, device=device).expand(batch, -1))


def buffer_keys(slots: Slots, size: int) -> Keys:
    """Every slot of a static buffer of `size`, written or not: it never changes between two prefills."""
    device, (batch, n) = slots.origin.device, slots.origin.shape
    tail = torch.arange(slots.tail, slots.tail + size - n, device=device).expand(batch, -1)
    return Keys(slots.origin, slots.valid, slots.bias).then(tail)


def reduce_mask(
    mask: Mask | None,
    *,
    rows: Tensor | None,
    queries: Tensor,
    keys: Keys,
    flash: bool,
    dtype: torch.dtype,
    first: int = 0,
    hides: tuple[Tensor, Tensor] | None = None,
) -> Mask | None:
    """The mask of a pruned layer.

    Args:
        mask: what transformers built: None (plain causal), a padding mask ``[B, K0]``, ``[B, 1, Q0, K0]`` (bool,
            True = visible; or float, added to the logits), or a function of indices (flex attention). All in original
            coordinates.
        rows: ``[B, Q]`` index of the surviving queries within this forward, None when all survive.
        queries: ``[B, Q]`` original index of the queries.
        keys: as the layer stores them.
        flash: the kernel is causal by itself and takes padding masks only.
        dtype: of the layer's activations, which a mask with biases must have.
        first: original index of the mask's first column, where a window has moved on.
        hides: ``[B, Q]`` and ``[B, K]`` bool, queries and keys that do not see each other; not on a flash kernel. None:
            there are none.

    Returns:
        The same kind of mask over the queries and keys at hand; None stays None unless padding slots must be hidden.
        With biases, a float mask.

    Raises:
        UnsupportedModelError: biases, and a kernel that takes none.
    """
    if keys.bias is not None and (flash or isinstance(mask, BlockMask) or (mask is not None and mask.dim() == 2)):
        raise UnsupportedModelError(
            "the recipe adds a bias to the survivors' keys (rectifier), and flash and flex attention take none here; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if mask is None:
        if flash or (keys.valid is None and keys.bias is None and hides is None):
            return keys.valid
        causal = keys.origin[:, None, None, :] <= queries[:, None, :, None]
        if hides is not None:
            causal = causal & ~_apart(hides)
        return _biased(causal if keys.valid is None else causal & keys.valid[:, None, None, :], keys, dtype)
    width = mask.shape[-1]
    columns = keys.origin - first if first else keys.origin
    # transformers' mask may be narrower than the buffer: what lies beyond it has not been written yet
    visible = columns < width
    if first:
        visible = visible & (columns >= 0)
    if keys.valid is not None:
        visible = visible & keys.valid
    columns = columns.clamp(min=0, max=width - 1)
    if isinstance(mask, BlockMask):
        return _reduce_block_mask(mask, rows, queries, columns, visible, hides)
    if mask.dim() == 2:
        return take(mask, columns, 1) * visible.to(mask.dtype)
    if rows is not None:
        mask = take(mask, rows, 2)
    mask = take(mask, columns, 3)
    hidden = ~visible[:, None, None, :]
    if hides is not None:
        hidden = hidden | _apart(hides)
    if mask.dtype == torch.bool:
        return _biased(mask & ~hidden, keys, dtype)
    return _biased(mask.masked_fill(hidden, torch.finfo(mask.dtype).min), keys, dtype)


def _apart(hides: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, 1, Q, K]`` True where a query does not see a key, of `hides` as in `reduce_mask`."""
    queries, keys = hides
    return queries[:, None, :, None] & keys[:, None, None, :]


def _biased(mask: Tensor, keys: Keys, dtype: torch.dtype) -> Tensor:
    """The mask ``[B, 1, Q, K]`` with the keys' biases added, as numbers; untouched where there are none."""
    if keys.bias is None:
        return mask
    bias = keys.bias[:, None, None, :].to(mask.device, dtype)
    return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias


def _joined(first: Tensor | None, second: Tensor | None, sides: tuple[int, int], fill: float) -> Tensor | None:
    """``[B, m + n]`` of ``[B, m]`` and ``[B, n]``, where a missing one is all `fill`; None of two missing ones."""
    known = first if first is not None else second
    if known is None:
        return None
    halves = [
        known.new_full((known.shape[0], n), fill) if x is None else x
        for x, n in zip((first, second), sides, strict=True)
    ]
    return torch.cat([half.to(known.device) for half in halves], dim=1)


def _reduce_block_mask(
    mask: BlockMask,
    rows: Tensor | None,
    queries: Tensor,
    columns: Tensor,
    visible: Tensor,
    hides: tuple[Tensor, Tensor] | None,
) -> Mask:
    """`reduce_mask` for flex attention: the same function, of the original indices."""
    allowed = mask.mask_mod

    def left(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = q if rows is None else rows[b, q]
        seen = allowed(b, h, row, columns[b, k]) & visible[b, k]
        return seen if hides is None else seen & ~(hides[0][b, q] & hides[1][b, k])

    (batch, n), length = columns.shape, queries.shape[1]
    return create_block_mask(left, batch, None, length, n, device=str(columns.device))


def rater_rows(mask: Mask | None, text: Tensor, stored: int, length: int, *, biased: bool = False) -> Tensor:
    """What each text token may attend to among this forward's tokens: ``[B, 1, T, L]`` bool; with biases, numbers.

    Args:
        mask: the layer's own mask, in the layer's coordinates; it hides padding slots too. None is plain causal.
        text: ``[B, T]`` index of the text tokens in the layer's sequence.
        stored: tokens of earlier forwards that stand before this forward's keys.
        length: L, tokens of this forward.
        biased: the mask holds biases of keys, which count.
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
    return rows if biased else ops.is_shown(rows)
