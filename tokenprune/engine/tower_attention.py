"""Attention inside a vision tower, from the queries and keys that a block has projected: exact beside any kernel.

Neither signal needs the matrix of all pairs: the class token's attention is one row a head, and received attention is
summed over blocks of rows whose size is bounded.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core import ops
from tokenprune.engine.calls import bound
from tokenprune.engine.traces import Handle, post_hook, pre_hook
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.tower import projections_of

AT_ONCE = 2**22
"""Numbers of an attention matrix that are held at once: 16 MiB in float32."""


@dataclass(eq=False)
class BlockCall:
    """A block's attention on its way: what it was called with, and what it has projected."""

    attention: nn.Module
    arguments: dict[str, Any]
    """By name, as its forward takes them."""
    projected: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of its projections, and of the norms behind them, by their names."""

    @property
    def scale(self) -> float:
        for name in ("scaling", "scale"):
            if isinstance(given := getattr(self.attention, name, None), int | float):
                return float(given)
        return float(self.queries().shape[-1]) ** -0.5

    def keys(self) -> Tensor:
        """``[R, n, H, d]``, normed where the family does, without rotary embedding."""
        return self._heads("k")

    def queries(self) -> Tensor:
        """As `keys`."""
        return self._heads("q")

    def turned(self) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[R, n, H, d]`` as the block compares them: with rotary embedding, where it has one."""
        q, k = self.queries(), self.keys()
        rope = self.arguments.get("position_embeddings")
        if rope is not None:
            q, k = _rotary(self.attention, self.arguments)(q, k, *rope)
        return q, k.repeat_interleave(q.shape[-2] // k.shape[-2], -2) if q.shape[-2] > k.shape[-2] else k

    def lengths(self) -> list[int] | None:
        """How many tokens see each other, stretch by stretch of a packed sequence; None where it is not packed so."""
        for name in ("cu_seqlens", "cu_seq_lens_q"):
            if isinstance(borders := self.arguments.get(name), Tensor):
                return borders.diff().tolist()
        return None

    def _heads(self, which: str) -> Tensor:
        norm, projection = self.projected.get(f"{which}_norm"), self.projected.get(which)
        rows = projection if norm is None else norm
        if rows is None:
            raise UnsupportedModelError(
                f"{type(self.attention).__name__} ran without calling its projections (a fused kernel?): "
                "signals of the vision tower cannot be read"
            )
        size = getattr(self.attention, "head_dim", None)
        if not isinstance(size, int):
            size = rows.shape[-1] // _head_count(self.attention)
        if projection is not None and rows.dim() > projection.dim():  # a norm behind the split into heads
            rows = rows if rows.shape[-2] * size == projection.shape[-1] else rows.transpose(-2, -3)
        else:
            rows = rows.unflatten(-1, (-1, size))
        return rows if rows.dim() == 4 else rows[None]


class _Running(threading.local):
    """The call of each thread."""

    call: BlockCall | None = None


def mount(attention: nn.Module, ran: Callable[[BlockCall], None]) -> list[Handle]:
    """Hooks on a block's attention that call `ran` once it has run; returns their handles."""
    names = projections_of(attention)
    assert names is not None
    running = _Running()

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.call = BlockCall(module, bound(module, args, kwargs))

    def projected(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if running.call is None:
                return
            if name == "fused":
                q, k, _ = _split(output)
                running.call.projected.update(q=q, k=k)
            else:
                running.call.projected[name] = output

        return hook

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        call, running.call = running.call, None
        if call is not None and output is not None:
            ran(call)

    handles = [pre_hook(attention, begins)]
    for name, own in zip(names, ("q", "k") if len(names) == 2 else ("fused",), strict=True):
        handles.append(post_hook(getattr(attention, name), projected(own)))
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            handles.append(post_hook(norm, projected(name)))
    handles.append(post_hook(attention, ends, always_call=True))
    return handles


def class_attention(call: BlockCall) -> Tensor:
    """``[R, n]`` float32: the first token's row of attention, mean over heads."""
    q, k = call.turned()
    rows = torch.einsum("rhd,rnhd->rhn", q[:, 0], k).float() * call.scale
    mask = call.arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        rows = _masked(rows[:, :, None], mask[:, :, :1])[:, :, 0]
    return rows.softmax(-1).mean(1)


def received_attention(call: BlockCall, pictures: Sequence[int] | None, real: Tensor | None = None) -> Tensor:
    """``[R, n]`` float32: the attention that each token gets, mean over heads and over the tokens of its picture.

    Args:
        call: of the block.
        pictures: lengths of the pictures of a packed sequence, in order; None: each row is one, or the stretches that
            see each other are.
        real: ``[patches]`` index of those that are no padding, in rows that are padded; None: all.
    """
    q, k = call.turned()
    lengths = call.lengths()
    mask = call.arguments.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
    if real is not None:
        asks = torch.zeros(q.shape[:2].numel(), device=q.device).index_fill(0, real.to(q.device), 1.0).view(q.shape[:2])
        return _received(q, k, call.scale, mask, asks) / asks.sum(1, keepdim=True).clamp(min=1)
    if lengths is None:
        total = _received(q, k, call.scale, mask)
    else:
        total = q.new_zeros(q.shape[:2], dtype=torch.float32)
        for places in _alike(lengths, q.device):
            total[0, places] = _received(q[0, places], k[0, places], call.scale, None)
    return total / _population(pictures or lengths, total, mask)


def _received(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, asks: Tensor | None = None) -> Tensor:
    """``[R, n]`` sums of the columns of the attention matrices, mean over heads, a bounded block of them at a time.

    `asks` ``[R, n]`` weighs the rows: 0 on padding.
    """
    rows, n, heads, _ = q.shape
    total = torch.zeros(rows, n, dtype=torch.float32, device=q.device)
    some = max(1, AT_ONCE // (heads * n * n))
    for first in range(0, rows, some):
        own = slice(first, first + some)
        keys = k[own].permute(0, 2, 3, 1)
        step = max(1, AT_ONCE // (heads * n * keys.shape[0]))
        for start in range(0, n, step):
            logits = (q[own, start : start + step].transpose(1, 2) @ keys).float() * scale
            if mask is not None:
                logits = _masked(logits, (mask[own] if mask.shape[0] > 1 else mask)[:, :, start : start + step])
            each = logits.softmax(-1).mean(1)
            total[own] += (each if asks is None else each * asks[own, start : start + step, None]).sum(1)
    return total


def _population(pictures: Sequence[int] | None, total: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens the picture of each token has: ``[1, n]`` or ``[R, n]``, or one number."""
    if pictures is not None:
        each = torch.tensor(pictures, device=total.device)
        return each.repeat_interleave(each)[None]
    if mask is not None:  # of several pictures in a row, each sees itself
        return ops.is_shown(mask[:, 0]).sum(1).clamp(min=1)
    return torch.tensor(total.shape[1], device=total.device)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask


def _alike(lengths: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """``[S, n]`` places of the stretches of one length, a length at a time."""
    starts: dict[int, list[int]] = defaultdict(list)
    at = 0
    for length in lengths:
        starts[length].append(at)
        at += length
    for length, firsts in starts.items():
        if length:
            yield torch.tensor(firsts, device=device)[:, None] + torch.arange(length, device=device)


def _split(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[..., H·d]`` out of one projection."""
    q, k, v = fused.unflatten(-1, (3, -1)).unbind(-2)
    return q, k, v


def _head_count(attention: Any) -> int:
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        if isinstance(given := getattr(attention, name, None), int):
            return given
    raise UnsupportedModelError(f"{type(attention).__name__} does not say how many heads it has")


def _rotary(attention: nn.Module, arguments: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The family's own rotary embedding of queries and keys ``[R, n, H, d]``, in a call with these arguments."""
    names = vars(sys.modules[type(attention).__module__])
    if turn := names.get("apply_multidimensional_rope"):
        places = arguments["position_ids"]
        return lambda q, k, cos, sin: (turn(q, cos, sin, places), turn(k, cos, sin, places))
    if apply := names.get("apply_rotary_pos_emb_vision"):
        return apply  # type: ignore[no-any-return, unused-ignore]
    apply = names.get("apply_rotary_pos_emb")
    if apply is None or "unsqueeze_dim" not in inspect.signature(apply).parameters:
        raise UnsupportedModelError(
            f"{type(attention).__name__} turns queries and keys in a way that nobody has adapted: "
            "its attention cannot be read"
        )
    return lambda q, k, cos, sin: apply(q, k, cos, sin, unsqueeze_dim=-2)
