"""One forward of the language model: how its sequence gets shorter, and what each layer must be handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.tokens import Tokens
from tokenprune.engine.alive import Alive
from tokenprune.engine.cache import Slots, forget, slots_of
from tokenprune.engine.gather import take
from tokenprune.engine.masks import Mask, join_valid, past_slots, reduce_mask
from tokenprune.engine.projections import Rope
from tokenprune.engine.prompt import Prompt
from tokenprune.errors import UnsupportedModelError
from tokenprune.stage import StageResult


@dataclass(eq=False)
class Last:
    """The last result of a computation that layers share, and what it was made from."""

    of: tuple[Any, ...] = ()
    number: int = 0
    value: Any = None

    def get(self, of: tuple[Any, ...], make: Callable[[], Any], number: int = 0) -> Any:
        """`value` if it was made of the very same objects and the same number, else what `make` makes."""
        if number != self.number or len(of) != len(self.of) or not all(map(is_, of, self.of)):
            self.of, self.number, self.value = of, number, make()
        return self.value


@dataclass(eq=False)
class Forward:
    """State of one forward of the language model, alive from its pre-hook to its end."""

    batch: int
    length: int
    past: int
    """Untouched length of the cache before this forward; for a decode step on a static cache 0, and not used."""
    static: bool
    """Whether the cache is static: attention then always sees its whole buffer."""
    positions: Tensor
    """Position ids of this forward, ``[1 or B, L]`` or ``[3, 1 or B, L]``."""
    rotary: Any
    """The text model's rotary embedding module."""
    flash: bool
    """Whether attention runs on a flash kernel."""
    shifts: list[Tensor]
    """``[B]`` each: by how much position ids move down, in layers where survivors were renumbered on a cache."""
    untouched: bool = False
    """Whether no layer needs other arguments than the text model's, unless that has made a mask."""
    bucket: int = 1
    """What is dropped counts in steps of so many tokens: the sequence is padded to the next length. 1 is exact."""
    alive: Alive | None = None
    changes: Last = field(default_factory=lambda: Last())
    """What layers between two stages share: the arguments they are handed, the slots they store. Made by lambdas, as
    torch.compile cannot trace a class that a dataclass calls, and transformers compiles decoding on static caches."""
    shifted: Last = field(default_factory=lambda: Last())
    slots: Last = field(default_factory=lambda: Last())
    ends: Last = field(default_factory=lambda: Last())

    def keep(
        self, before: Tokens, result: StageResult, hidden: Tensor, lengths: list[int], *, renumber: bool
    ) -> tuple[Tensor, Tokens, Tensor]:
        """Shorten the sequence to what a stage left.

        Args:
            before: the tokens that came in; `slot` is their index in the present sequence.
            result: what the stage made of them.
            hidden: ``[B, n, D]`` hidden states of the present sequence.
            lengths: real length of each row of the present sequence; updated in place.
            renumber: `renumber` comes next, so that positions need not be followed.

        Returns:
            Hidden states ``[B, m, D]``; the vision tokens in their new slots; ``[B, n]`` new index of every old slot
            (meaningful where it was kept).
        """
        after, alive = result.tokens, self.alive
        batch, n = hidden.shape[:2]
        real = None if alive is None else alive.valid
        stays = torch.ones(batch, n, dtype=torch.bool, device=hidden.device) if real is None else real.clone()
        stays = ops.put_(stays, before.slot, False, before.valid_if_padded)
        counted = ops.put_(stays, after.slot, True, after.valid_if_padded).cumsum(1)
        for row in range(batch):
            lengths[row] += after.sizes[row] - before.sizes[row]
        m = self.length - (self.length - max(lengths)) // self.bucket * self.bucket
        number, valid = torch.arange(1, m + 1, device=hidden.device)[None], None
        moved = counted - 1
        if min(lengths) < m or self.bucket > 1:
            padding = (m - transfer.ints(lengths, hidden.device))[:, None]
            number, moved = number - padding, moved + padding
            valid = number > 0
        keep = ops.reaching(counted, number)
        self.alive = Alive(keep, valid) if alive is None else alive.pick(keep, valid, positions=not renumber)
        self._forget_shared()
        moved = moved.clamp(min=0)
        hidden, tokens = take(hidden, keep, 1), after.moved(moved)
        return (_write_(hidden, tokens, result.merged) if result.merged.shape[1] else hidden), tokens, moved

    def renumber(self, prompt: Prompt, hidden: Tensor, slots: Slots | None) -> None:
        """Number the survivors through (on all axes), skipping padding.

        Rotary embeddings know differences alone, so the first prompt's numbers may end where the untouched prompt's do:
        later tokens keep their position ids. On a cache they go on from where it ends, and later ids are shifted.

        Args:
            prompt: this forward's.
            hidden: ``[B, n, D]`` of the survivors, for dtype and device.
            slots: what the layer's cache holds from earlier forwards.
        """
        if self.alive is None:
            return
        self._forget_shared()
        alive, positions, real = self.alive, self.positions, prompt.real
        if prompt.counts_up and not self.past:
            alive.numbered = slice(self.length - alive.index.shape[1], self.length)
            return
        start, end = self.ends.get((real,), lambda: self._ends(real))
        if slots is not None and slots.shift is not None:
            start = start - slots.shift.to(start.device)
        counted = alive.valid
        if real is not None:
            there = take(real, alive.index, 1)
            counted = there if counted is None else there & counted
        if counted is None:
            n = alive.index.shape[1]
            number, shift = torch.arange(n, device=start.device), end - start - n
        else:
            number, shift = (counted.cumsum(1) - 1).clamp(min=0), end - start - counted.sum(1)
        if not self.past:
            start, shift = start + shift, None
        ids, alive.shift = number + start[:, None], shift
        alive.positions = ids if positions.dim() == 2 else ids.expand(3, -1, -1)
        cos, sin = self.rotary(hidden, alive.positions)
        alive.rope = ops.in_memory(cos), ops.in_memory(sin)

    def _ends(self, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """First position id of each row ``[B]``, and the one behind its last."""
        positions = self.positions
        low, high = (positions, positions) if positions.dim() == 2 else (positions.amin(0), positions.amax(0))
        low, high = low.expand(self.batch, -1), high.expand(self.batch, -1)
        if real is None:
            return low.amin(1), high.amax(1) + 1
        return low.masked_fill(~real, int(1e9)).amin(1), high.masked_fill(~real, -1).amax(1) + 1

    def adjust(self, kwargs: dict[str, Any], layer: Any | None) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, in that layer's own coordinates.

        Untouched where they are right already, which in most steps of decoding they are.
        """
        slots, mask = slots_of(layer), kwargs.get("attention_mask")
        if self.alive is None and (slots is None or (mask is None and slots.valid is None and slots.shift is None)):
            return kwargs
        of = (mask, kwargs["position_embeddings"][0], kwargs.get("position_ids"), slots)
        stored = self._physical(layer) if self.static and layer is not None else 0
        return {**kwargs, **self.changes.get(of, lambda: self._changes(kwargs, layer, slots), stored)}

    def store(self, layer: Any | None) -> None:
        """Tell a pruned layer's cache what it is about to store."""
        if layer is None or self.alive is None:
            return
        slots = slots_of(layer)
        forget(layer, self.length - self.alive.index.shape[1], self.slots.get((slots,), lambda: self._slots(slots)))

    def stored(self, layer: Any | None) -> int:
        """Tokens of earlier forwards that stand before this forward's keys in `layer`."""
        if layer is None:
            return 0
        slots = slots_of(layer)
        if slots is None:
            return self.past
        return slots.cropped(self.past).origin.shape[1] + max(0, self.past - slots.tail)

    def _forget_shared(self) -> None:
        for shared in (self.changes, self.shifted, self.slots):
            shared.of, shared.value = (), None

    def _slots(self, slots: Slots | None) -> Slots:
        alive = self.alive
        assert alive is not None
        origin, valid = past_slots(slots, self.past, self.batch, alive.index.device)
        joined = join_valid(valid, alive.valid, origin.shape[1], alive.index.shape[1])
        shift = alive.shift if slots is None or slots.shift is None or alive.shift is not None else slots.shift
        return Slots(torch.cat([origin, self.past + alive.index], dim=1), joined, self.past + self.length, shift)

    def _mask(self, mask: Any, layer: Any | None, slots: Slots | None) -> Mask | None:
        alive, device = self.alive, self.positions.device
        if mask is not None and not isinstance(mask, Mask):
            raise UnsupportedModelError(
                f"attention_mask of type {type(mask).__name__} reached a decoder layer; "
                "expected a tensor (sdpa, eager, flash) or a BlockMask (flex)"
            )
        valid = None if alive is None else alive.valid
        if mask is None and valid is None and (slots is None or slots.valid is None):
            return None
        index = torch.arange(self.length, device=device).expand(self.batch, -1) if alive is None else alive.index
        if layer is None:
            keys, kept = index, valid
        elif self.static and alive is None and slots is not None:
            keys, kept = _static_keys(slots, layer.max_cache_len)
        else:
            past, past_valid = past_slots(slots, self.past, self.batch, device)
            keys = torch.cat([past, self.past + index], dim=1)
            kept = join_valid(past_valid, valid, past.shape[1], index.shape[1])
            if self.static:
                free = self._physical(layer) - keys.shape[1]
                start = self.past + self.length
                unwritten = torch.arange(start, start + free, device=device).expand(self.batch, -1)
                kept = join_valid(kept, None, keys.shape[1], free) if kept is not None else None
                keys = torch.cat([keys, unwritten], dim=1)
        return reduce_mask(
            mask,
            rows=None if alive is None else alive.index,
            queries=self.past + index,
            keys=keys,
            valid=kept,
            flash=self.flash,
        )

    def _physical(self, layer: Any) -> int:
        """Slots in a static layer's buffer: a first prefill makes it smaller by what it has dropped so far."""
        size = int(layer.max_cache_len)
        if self.alive is None or self.past or (layer.is_initialized and not layer.shrunk):
            return size
        return size + int(layer.shrunk) - (self.length - self.alive.index.shape[1])

    def _changes(self, kwargs: dict[str, Any], layer: Any | None, slots: Slots | None) -> dict[str, Any]:
        """Arguments that differ from those of the untouched layer."""
        rope, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        if self.alive is not None:
            # A flash kernel would take gaps in the ids for packed sequences.
            rope, ids = self.alive.positioned(rope, None if self.flash else ids)
        elif slots is not None and slots.shift is not None:
            which = [shift is slots.shift for shift in self.shifts].index(True)
            rope, moved = self.shifted.get((rope[0],), lambda: self._shifted(rope[0]))[which]
            ids = moved if ids is not None and moved.dim() == 2 else ids
        mask = self._mask(kwargs.get("attention_mask"), layer, slots)
        changed = {"attention_mask": mask, "position_embeddings": rope}
        return {**changed, "position_ids": ids} if "position_ids" in kwargs else changed

    def _shifted(self, like: Tensor) -> list[tuple[Rope, Tensor]]:
        """Rotary tables and position ids of this forward, moved down by each of `shifts`: of all in one go."""
        full, number = self.positions, len(self.shifts)
        shifts = torch.stack([shift.to(full.device) for shift in self.shifts])
        ids = full.expand(*full.shape[:-2], self.batch, -1).unsqueeze(-3) - shifts[..., None]
        tables = self.rotary(like, ids.flatten(-3, -2))
        cos, sin = (table.unflatten(-3, (number, self.batch)).unbind(-4) for table in tables)
        return [((cos[i], sin[i]), ids.select(-3, i)) for i in range(number)]


def _static_keys(slots: Slots, size: int) -> tuple[Tensor, Tensor | None]:
    """Original index of every slot of a static buffer, written or not: it never changes between two prefills."""
    device, (batch, n) = slots.origin.device, slots.origin.shape
    tail = torch.arange(slots.tail, slots.tail + size - n, device=device).expand(batch, -1)
    valid = None if slots.valid is None else join_valid(slots.valid, None, n, size - n)
    return torch.cat([slots.origin, tail], dim=1), valid


def _write_(hidden: Tensor, tokens: Tokens, merged: Tensor) -> Tensor:
    """Overwrite `hidden` in the slots of the `merged` tokens, ``[B, M]`` original indices, -1 where padded."""
    origin = tokens.origin.masked_fill(~tokens.valid, max(tokens.total)) if tokens.padded else tokens.origin
    rank = torch.searchsorted(origin, merged)  # 0 for padding, which writes what stands at the first token anyway
    return ops.put_rows_(hidden, tokens.slot.gather(1, rank), ops.take_rows(tokens.hidden, rank).to(hidden.dtype))
