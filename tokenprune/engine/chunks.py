"""Prompts that come in several forwards: their chunks wait until the last token is in, and run as one prompt.

A stage judges by the whole prompt, and from its layer on no token may have seen what it drops: the tokens of earlier
chunks neither. So those layers must run behind the stage for all chunks. A stage that reads the attention of the layer
before needs that layer whole too, which leaves one or two layers of most recipes: the language model waits altogether.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from tokenprune.engine.cache import cache_in, held_in, hold
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import Anatomy, Pictures


@dataclass(frozen=True, eq=False)
class Chunk:
    """One chunk, as the text model was called with it."""

    call: Mapping[str, Any]
    """The text model's keyword arguments."""
    vision: Tensor
    """``[B, L]``, 0 on text, kinds of vision tokens."""
    pictures: Pictures
    """What its call has told of its pictures."""

    @property
    def embeddings(self) -> Tensor:
        """``[B, L, D]``."""
        embeddings: Tensor = self.call["inputs_embeds"]
        return embeddings


@dataclass(frozen=True, eq=False)
class Held:
    """The chunks of a prompt that wait, in the cache that they were to be written to."""

    chunks: tuple[Chunk, ...] = field(default=())

    def __len__(self) -> int:
        """Tokens."""
        return sum(chunk.embeddings.shape[1] for chunk in self.chunks)


def wait(anatomy: Anatomy, chunk: Chunk) -> BaseModelOutputWithPast:
    """Hold a chunk back; what the text model returns for it, which is no token at all.

    Raises:
        UnsupportedModelError: there is no cache to go on with.
    """
    cache = cache_in(chunk.call)
    if cache is None and chunk.call.get("use_cache", anatomy.text.config.use_cache):
        cache = DynamicCache(config=anatomy.text.config)
    if not isinstance(cache, Cache):
        raise UnsupportedModelError("a prompt in chunks goes on where its cache ends: give every chunk the same cache")
    before = held_in(cache) or Held()
    hold(cache, Held((*before.chunks, chunk)))
    return BaseModelOutputWithPast(
        last_hidden_state=chunk.embeddings[:, :0], **{anatomy.cache_name: cache, "hidden_states": None}
    )


def joined(last: Chunk) -> Chunk:
    """The whole prompt: the chunks that its cache has held back, which it does not any more, and the last.

    Raises:
        InputError: its attention mask is none of padding for the whole prompt.
    """
    cache = cache_in(last.call)
    before = held_in(cache)
    if before is None:
        return last
    hold(cache, None)
    chunks = (*before.chunks, last)
    embeddings = torch.cat([chunk.embeddings for chunk in chunks], 1)
    batch, lengths = embeddings.shape[0], [chunk.embeddings.shape[1] for chunk in chunks]
    mask = _masks([chunk.call.get("attention_mask") for chunk in chunks], lengths, batch)
    call = {**last.call, "inputs_embeds": embeddings, "attention_mask": mask, **_deepstack(chunks)}
    positions = [chunk.call.get("position_ids") for chunk in chunks]
    known = [ids for ids in positions if ids is not None]
    call["position_ids"] = None
    if len(known) == len(chunks):
        axes = max(ids.dim() for ids in known)
        call["position_ids"] = torch.cat([ids.expand(*_front(ids, axes), batch, -1) for ids in known], -1)
    return Chunk(call, torch.cat([chunk.vision for chunk in chunks], 1), _pictures([c.pictures for c in chunks]))


def _masks(masks: list[Any], lengths: list[int], batch: int) -> Any:
    """As `_mask`, for each kind of layer where `generate` makes one for each (static caches)."""
    if all(isinstance(mask, dict) for mask in masks):
        return {kind: _mask([mask.get(kind) for mask in masks], lengths, batch) for kind in masks[-1]}
    return _mask(masks, lengths, batch)


def _mask(masks: list[Any], lengths: list[int], batch: int) -> Tensor | None:
    """The attention mask of the whole prompt: of padding, the last chunk's; with a row for each query, all of them."""
    last, length = masks[-1], sum(lengths)
    if last is None or (isinstance(last, Tensor) and last.dim() == 2 and last.shape[1] >= length):
        return last
    if isinstance(last, Tensor) and last.dim() == 4:
        ends = accumulate(lengths)
        rows = [
            _causal(last, end - own, end) if mask is None else mask
            for mask, own, end in zip(masks, lengths, ends, strict=True)
        ]
        if [mask.shape[2] for mask in rows if isinstance(mask, Tensor) and mask.dim() == 4] == lengths:
            hidden = False if last.dtype == torch.bool else torch.finfo(last.dtype).min
            return torch.cat([pad(mask, (0, last.shape[3] - mask.shape[3]), value=hidden) for mask in rows], 2)
    got = tuple(last.shape) if isinstance(last, Tensor) else type(last).__name__
    raise InputError(f"attention_mask of the last chunk: expected [{batch}, {length} or more], got {got}")


def _causal(like: Tensor, start: int, end: int) -> Tensor:
    """The rows that a chunk without a mask stands for: no padding, and each token sees itself and what is before."""
    columns = torch.arange(like.shape[3], device=like.device)
    seen = (columns <= columns[start:end, None]).expand(*like.shape[:2], -1, -1)
    if like.dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)


def _front(ids: Tensor, axes: int) -> tuple[int, ...]:
    return (int(ids.shape[0]),) if axes == 3 else ()


def _pictures(told: list[Pictures]) -> Pictures:
    """What the chunks have told of their pictures, together."""
    pixels = {each.pixels for each in told if each.pixels is not None}
    sizes = [each.sizes for each in told if each.sizes is not None]
    return Pictures(pixels.pop() if len(pixels) == 1 else None, torch.cat(sizes) if sizes else None)


def _deepstack(chunks: tuple[Chunk, ...]) -> dict[str, Any]:
    """Features for early layers (Qwen3-VL): a row for each vision token, sample after sample."""
    levels = next((c.call["deepstack_visual_embeds"] for c in chunks if c.call.get("deepstack_visual_embeds")), None)
    if levels is None:
        return {}
    masks, full = [], []
    for chunk in chunks:
        mask, own = chunk.call.get("visual_pos_masks"), chunk.call.get("deepstack_visual_embeds")
        place = torch.zeros_like(chunk.vision, dtype=torch.bool) if mask is None else mask.to(chunk.vision.device)
        masks.append(place)
        rows = chunk.embeddings.new_zeros(len(levels), *place.shape, levels[0].shape[-1], dtype=levels[0].dtype)
        for number, level in enumerate(own or ()):
            rows[number, place] = level.to(rows.device)
        full.append(rows)
    mask, every = torch.cat(masks, 1), torch.cat(full, 2)
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": [level[mask] for level in every]}
