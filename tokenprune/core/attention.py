"""Attention of raters over vision tokens, from queries and keys, beside any attention kernel, without a full matrix.

Rows are softmaxed exactly, in float32, over all keys that the row may see, a few rows at a time: memory is that of
B·H·rows·L numbers, bounded by `RaterAttention.block_bytes`, never L·L. The layer's own attention (SDPA, Flash, Flex) is
neither asked nor disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokenprune.core import gram, ops
from tokenprune.errors import InputError

Layer = Literal["previous", "next"]
Normalise = Literal["all", "vision"]

GRAVITY_FLOOR = 0.1
"""Attention gravity is bounded from below by this share of its peak: at distances where rotary embeddings turn all-ones
vectors against each other (1707 tokens for width 128, base 10000) it would change sign. Below 700 tokens, where the
method was published, it never gets there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Queries of the text tokens and keys of all tokens, of one layer. B samples, T text tokens, L tokens, width d."""

    q: Tensor
    """``[B, H, T, d]``."""
    k: Tensor
    """``[B, Hkv, L, d]``; query head h reads key head h // (H / Hkv)."""
    scaling: float
    """Factor of the dot products, as a rule d ** -0.5."""
    visible: Tensor | None = None
    """``[B or 1, H or 1, T, L]``: bool, True where a text token may see a token; or a number that is added to the dot
    product, where the lowest number of the dtype means hidden. None: all see all."""
    sees_itself: bool = False
    """True if no row with weight is fully masked (each rater sees itself), so that empty rows need no check."""
    softcap: float | None = None
    """Scaled dot products are squeezed to ±softcap by tanh (Gemma)."""
    columns: Tensor | None = None
    """``[B, N]`` int64, index of each vision token among these L tokens, where it is not `RaterAttention.columns`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RaterAttention:
    """The `tokenprune.core.tokens.Attention` of one place."""

    project: Callable[[Layer, bool, Tensor | None], Projection]
    """(layer, with rotary embedding?, rows) to queries and keys, called when a part asks. Rows ``[B, R]`` name the text
    tokens whose queries are wanted, T of the `Projection` is then R; None: all."""
    columns: Tensor
    """``[B, N]`` int64, index of each vision token among the L tokens; anything on padding."""
    columns_valid: Tensor | None = None
    """``[B, N]`` bool, False on padding; None without."""
    kernel: Callable[[Layer], tuple[Tensor, Tensor]] | None = None
    """layer to the rotary embedding of all-ones queries ``[B, 1, T, d]`` and keys ``[B, 1, L, d]``, for gravity."""
    gather: Callable[[Layer, Tensor], Tensor] | None = None
    """(layer, ``[B, h, ...]`` of the heads that `project` gives) to all heads of the layer, ``[B, H, ...]``, where
    other processes hold the rest, as many each; None: it gives all."""
    most: int | None = None
    """Text tokens of a sample that have weight at once, where a bound is known without looking at the weights."""
    block_bytes: int = 64 * 2**20
    """Bound on the float32 block of attention rows that is held at once (at least one row)."""

    def scores(
        self,
        raters: Tensor,
        *,
        rope: bool = True,
        normalise: Normalise = "all",
        layer: Layer = "previous",
        gravity: bool = False,
    ) -> Tensor:
        """Rater-weighted mean of the attention rows.

        Args:
            raters: ``[B, T]`` weights; rows of weight 0 contribute 0.
            rope: with rotary embedding.
            normalise: softmax over ``all`` visible keys, or over the sample's visible ``vision`` keys alone.
            layer: whose queries and keys.
            gravity: divide each entry by what rotary distance alone gives (SparseVLM+).

        Returns:
            ``[B, H, N]`` float32, 0 on padding; sums over N to 1 with ``vision``, to at most 1 with ``all``.

        Raises:
            InputError: raters do not fit the text tokens, or gravity where no kernel is known.
        """
        rows, raters = self._rated(raters)
        source = self._source(raters, layer, rope, rows)
        # A row that nobody rates must not count even if its numbers are not finite.
        source = replace(source, q=torch.where((raters > 0)[:, None, :, None], source.q, 0.0))
        kernel = self._kernel(layer, self._columns(source), rows) if gravity else None
        total = None
        for start, block, sees in self._blocks(source, normalise):
            stop = start + block.shape[2]
            weight = raters[:, None, start:stop, None].float()
            weight = (weight if sees is None else torch.where(sees, weight, 0.0)).mT
            if kernel is not None:
                block = self._vision(block, source) / self._gravity(kernel, start, stop, source.scaling)
            mean = weight @ block
            # Raters are averaged first and vision columns picked then: one row a head is gathered instead of R rows.
            mean = mean if kernel is not None else self._vision(mean, source)
            total = mean if total is None else total + mean
        if total is None:
            scores = raters.new_zeros(*source.q.shape[:2], self.columns.shape[1], dtype=torch.float32)
        else:
            scores = total.squeeze(2)
        return scores if self.gather is None else self.gather(layer, scores)

    def matrix(
        self, raters: Tensor, *, rope: bool = True, normalise: Normalise = "all", layer: Layer = "previous"
    ) -> Tensor:
        """Head-mean attention of each rater: ``[B, T, N]`` float32, 0 in rows of weight 0 and on padding.

        Arguments and errors as in `scores`.
        """
        rows, rated = self._rated(raters)
        source = self._source(rated, layer, rope, rows)
        empty = raters.new_zeros(*raters.shape, self.columns.shape[1], dtype=torch.float32)
        seeing = (block if sees is None else block * sees for _, block, sees in self._blocks(source, normalise))
        means = (block.mean(1, keepdim=True) for block in seeing)
        blocks = [self._vision(mean, source).squeeze(1) for mean in means]
        if not blocks:
            return empty
        mean = torch.cat(blocks, dim=1)
        if self.gather is not None:
            mean = self.gather(layer, mean.unsqueeze(1)).mean(1)
        matrix = mean.masked_fill((rated <= 0).unsqueeze(-1), 0.0)
        return matrix if rows is None else empty.scatter(1, rows.unsqueeze(-1).expand_as(matrix), matrix)

    def _rated(self, raters: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which text tokens ``[B, R]`` have weight (None: look at all), and their weights."""
        if self.most is None or self.most >= raters.shape[1]:
            return None, raters
        best = raters.topk(self.most, dim=1)
        return best.indices, best.values

    def _source(self, raters: Tensor, layer: Layer, rope: bool, rows: Tensor | None) -> Projection:
        source = self.project(layer, rope, rows)
        if (source.q.shape[0], source.q.shape[2]) != tuple(raters.shape):
            raise InputError(
                f"attention: queries are of {source.q.shape[2]} text tokens of {source.q.shape[0]} samples, "
                f"rater weights are {tuple(raters.shape)}"
            )
        if source.q.shape[1] % source.k.shape[1]:
            raise InputError(
                f"attention: {source.q.shape[1]} query heads cannot share {source.k.shape[1]} key heads evenly"
            )
        return source

    def _blocks(self, source: Projection, normalise: Normalise) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """A few rows at a time: the first one's text token, their attention ``[B, H, rows, L]``, and
        ``[B or 1, H or 1, rows, 1]`` bool, False for rows that see nothing, whose attention is meaningless."""
        batch, heads, texts, _ = source.q.shape
        k = source.k
        if not gram.sums_halves(source.q, k):
            k = k.contiguous().float()  # a batched product would copy keys, too, and takes far longer for it
        k = k.flatten(0, 1)
        # For `vision`, other keys are masked; gathering the vision tokens' keys would copy the largest tensor here.
        vision = self._is_vision(source) if normalise == "vision" else None
        many = max(1, self.block_bytes // max(1, 4 * batch * heads * k.shape[1]))
        for start in range(0, texts, many):
            rows = slice(start, min(start + many, texts))
            logits, visible = _visible(_logits(source, k, rows), source, rows)
            seen = vision if visible is None else visible if vision is None else visible & vision
            if seen is None:
                yield start, logits.softmax(-1), None
                continue
            # The lowest number, since a row of -inf alone would be NaN. A fill would take longer, even in place: it is
            # not vectorised. Adding the mask would take less, but padding that is NaN would stay NaN.
            attention = torch.where(seen, logits, torch.finfo(logits.dtype).min).softmax(-1)
            yield start, attention, None if source.sees_itself and vision is None else seen.any(-1, keepdim=True)

    def _vision(self, rows: Tensor, source: Projection) -> Tensor:
        """The vision tokens' entries ``[B, H, rows, N]`` of rows over all tokens; 0 on padding."""
        columns = self._columns(source)[:, None, None, :].expand(-1, *rows.shape[1:3], -1)
        entries = rows.expand(columns.shape[0], -1, -1, -1).gather(3, columns)
        valid = self.columns_valid
        return entries if valid is None else entries.masked_fill(~valid[:, None, None, :], 0.0)

    def _is_vision(self, source: Projection) -> Tensor:
        """``[B, 1, 1, L]`` bool, True at the vision tokens."""
        columns = self._columns(source)
        nowhere = torch.zeros(columns.shape[0], source.k.shape[2], dtype=torch.bool, device=columns.device)
        return ops.put_(nowhere, columns, True, self.columns_valid)[:, None, None, :]

    def _columns(self, source: Projection) -> Tensor:
        return self.columns if source.columns is None else source.columns

    def _kernel(self, layer: Layer, columns: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.kernel is None:
            raise InputError("attention gravity needs the layer's rotary embedding of all-ones vectors: give `kernel`")
        q, k = self.kernel(layer)
        if rows is not None:
            q = q.expand(rows.shape[0], -1, -1, -1).gather(2, rows[:, None, :, None].expand(-1, 1, -1, q.shape[3]))
        k = k.float().expand(columns.shape[0], -1, -1, -1)
        return q.float(), k.gather(2, columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))

    def _gravity(self, kernel: tuple[Tensor, Tensor], start: int, stop: int, scaling: float) -> Tensor:
        """``[B, 1, rows, N]``: the kernel at each distance, at least a tenth of what it is at distance 0."""
        q, k = kernel[0][:, :, start:stop], kernel[1]
        peak = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
        return torch.maximum(q @ k.mT, GRAVITY_FLOOR * peak) * scaling


def attention_from_qk(
    q: Tensor,
    k: Tensor,
    *,
    vision: Tensor,
    text: Tensor,
    valid: Tensor | None = None,
    before_rope: tuple[Tensor, Tensor] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    layer: Layer = "previous",
    causal: bool = True,
) -> RaterAttention:
    """`RaterAttention` from the queries and keys of one layer: for a model of your own, in plain PyTorch.

        attention = attention_from_qk(q, k, vision=torch.arange(1, 577), text=torch.arange(577, 617))
        tokens = Tokens.from_hidden(hidden[:, 1:577], text=embedded[:, 577:617], attention=attention)

    Args:
        q: ``[B, H, L, d]`` queries of all L tokens, rotary embedding applied.
        k: ``[B, Hkv, L, d]`` keys; Hkv divides H.
        vision: ``[N]`` or ``[B, N]`` places of the vision tokens among the L tokens, ascending; -1 padded on the right.
        text: ``[T]`` or ``[B, T]`` places of the text tokens that may rate, as in ``Tokens.text``; -1 where padded.
        valid: ``[B, L]`` bool, False on padding; all True when not given.
        before_rope: (q, k) before the rotary embedding, for parts with ``rope: false``.
        scaling: factor of the dot products; d ** -0.5 when not given.
        softcap: as in `Projection`.
        layer: which layer q and k are from, seen from the place where tokens are dropped.
        causal: whether a token sees those before it and itself alone; else it sees all, as in an encoder, and text may
            stand anywhere.

    Raises:
        InputError: shapes that do not fit, or a text token that may rate and sees no vision token; and later, when a
            part asks for what was not given.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise InputError(f"q must be [B, H, L, d] and k [B, Hkv, L, d], got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, _, length, width = q.shape
    vision, text = (x.expand(batch, -1) if x.dim() == 1 else x for x in (vision, text))
    rows = text.clamp(min=0)
    visible = (text >= 0).unsqueeze(-1).expand(-1, -1, length)
    if causal:
        visible = visible & (torch.arange(length, device=q.device) <= rows.unsqueeze(-1))
    if valid is not None:
        visible = visible & valid.unsqueeze(1)
    columns = vision.clamp(min=0)
    _check_sight(visible.gather(2, columns.unsqueeze(1).expand(-1, text.shape[1], -1)), vision, text)

    def project(asked: Layer, rope: bool, wanted: Tensor | None) -> Projection:
        if asked != layer:
            raise InputError(f"attention of the {asked} layer was asked for, but q and k are of the {layer} one")
        if not rope and before_rope is None:
            raise InputError("attention without rotary embedding was asked for: give before_rope=(q, k)")
        queries, keys = (q, k) if rope or before_rope is None else before_rope
        at, seen = rows, visible
        if wanted is not None:
            at = rows.gather(1, wanted)
            seen = visible.expand(batch, -1, -1).gather(1, wanted.unsqueeze(-1).expand(-1, -1, length))
        return Projection(
            q=queries.gather(2, at[:, None, :, None].expand(-1, queries.shape[1], -1, width)),
            k=keys,
            scaling=width**-0.5 if scaling is None else scaling,
            visible=seen.unsqueeze(1),
            softcap=softcap,
        )

    return RaterAttention(project=project, columns=columns, columns_valid=vision >= 0)


def _check_sight(seen: Tensor, vision: Tensor, text: Tensor) -> None:
    """Raise `InputError` where a text token may rate and sees no vision token of its sample: it would rate them all 0.

    On an accelerator and in a compiled graph that is asserted on the device, which is not waited for.

    Args:
        seen: ``[B, T, N]`` bool, which vision tokens each text token sees.
        vision: ``[B, N]`` their places, -1 on padding.
        text: ``[B, T]`` places of the text tokens, -1 on padding.
    """
    there = vision >= 0
    blind = (text >= 0) & there.any(1, keepdim=True) & ~(seen & there.unsqueeze(1)).any(-1)
    if torch.compiler.is_compiling() or blind.device.type != "cpu":
        torch._assert_async(~blind.any(), "attention_from_qk: a text token that may rate sees no vision token")
        return
    if not blind.any():
        return
    row, column = blind.nonzero()[0].tolist()
    raise InputError(
        f"attention_from_qk: the text token at {int(text[row, column])} of sample {row} sees no vision token (the "
        f"first stands at {int(vision[row][there[row]][0])}), so it cannot rate them; name text tokens behind the "
        "image, or, where the layer's tokens see each other both ways, pass causal=False"
    )


def _logits(source: Projection, k: Tensor, rows: slice) -> Tensor:
    """Scaled dot products ``[B, H, rows, L]`` in float32, with `k` ``[B · Hkv, L, d]`` in half precision or float32.

    Query heads are grouped by key head; keys are not repeated.
    """
    q, half = source.q[:, :, rows], k.dtype != torch.float32
    q = q if half else q.float() * source.scaling  # in half precision that would be rounded
    logits = gram.products(q.reshape(k.shape[0], -1, k.shape[2]), k).view(*q.shape[:3], k.shape[1])
    logits = logits * source.scaling if half else logits
    return logits if source.softcap is None else torch.tanh(logits / source.softcap) * source.softcap


def _visible(logits: Tensor, source: Projection, rows: slice) -> tuple[Tensor, Tensor | None]:
    """`logits` of these rows with the numbers that `source.visible` adds, and a bool, True where they may look."""
    visible = None if source.visible is None else source.visible[..., rows, :]
    if visible is None or visible.dtype == torch.bool:
        return logits, visible
    return logits + visible.float(), ops.is_shown(visible)
