"""One forward of the language model: which tokens still stand, and what each layer must be handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.tokens import Tokens
from tokenprune.engine.alive import Alive
from tokenprune.engine.cache import forget, held_by, slots_of, window_of
from tokenprune.engine.cache_layers import CacheLayer, Slots
from tokenprune.engine.gather import take
from tokenprune.engine.leaving import Leaving
from tokenprune.engine.masks import Keys, Mask, buffer_keys, reduce_mask, stored_keys
from tokenprune.engine.projections import Rope
from tokenprune.engine.prompt import Prompt
from tokenprune.engine.skipping import Skipping
from tokenprune.errors import UnsupportedModelError
from tokenprune.stage import StageResult

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments of a layer that say where sequences in one row begin and end."""


@dataclass(eq=False)
class Memo:
    """The last result of a computation that neighbouring layers share, and what it was made from."""

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
    """L, tokens of this forward before any stage."""
    past: int
    """Untouched length of the cache before this forward; for a decode step on a static cache 0, and not used."""
    static: bool
    """Whether the cache is static: attention then always sees its whole buffer."""
    positions: Tensor
    """Position ids of this forward, ``[1 or B, L]`` or ``[3, 1 or B, L]``."""
    rotary: Callable[[Tensor, Tensor], Rope]
    """The text model's rotary embedding module."""
    flash: bool
    """Whether attention runs on a flash kernel."""
    shifts: list[Tensor]
    """``[B]`` each: by how much position ids move down, in layers where survivors were renumbered on a cache."""
    untouched: bool = False
    """True when every layer can be called exactly as the text model calls it. The first layer looks once more: a mask
    that the text model has made turns it off."""
    bucket: int = 1
    """Shortened lengths are rounded up so that what is missing of `length` is a multiple of this; 1 is exact."""
    alive: Alive | None = None
    """The tokens that still stand; None: all."""
    skipping: Skipping | None = None
    """The tokens that pass by the feed-forward from here on; None: none."""
    leaving: list[Leaving] = field(default_factory=list)
    """What caches are left with when this forward is over, those of other layers each; empty: with all they have."""
    changes: Memo = field(default_factory=lambda: Memo())
    """Memos of what layers between two stages share. Made by lambdas, as torch.compile cannot trace a class that a
    dataclass calls, and transformers compiles decoding on static caches."""
    windowed: Memo = field(default_factory=lambda: Memo())
    """`changes` of layers with a window, which take turns with the others."""
    recurrent: Memo = field(default_factory=lambda: Memo())
    """`changes` of recurrent layers."""
    shifted: Memo = field(default_factory=lambda: Memo())
    slots: Memo = field(default_factory=lambda: Memo())
    ends: Memo = field(default_factory=lambda: Memo())

    def apply(
        self, before: Tokens, result: StageResult, hidden: Tensor, lengths: list[int], *, renumber: bool
    ) -> tuple[Tensor, Tokens, Tensor]:
        """Shorten the sequence to what a stage left, and write the hidden states that it changed.

        Args:
            before: the tokens that came in; `slot` is their index in the present sequence.
            result: what the stage made of them.
            hidden: ``[B, n, D]`` hidden states of the present sequence.
            lengths: real length of each row of the present sequence; updated in place.
            renumber: set when `renumber` is called next; the old position ids need not be gathered then.

        Returns:
            Hidden states ``[B, m, D]``; the vision tokens in their new slots; ``[B, n]`` new index of every old slot
            (meaningful where it was kept).
        """
        after, alive = result.tokens, self.alive
        batch, n = hidden.shape[:2]
        real = None if alive is None else alive.valid
        # Text stays, vision tokens stay where the stage has left them: a mask over the present sequence, and a running
        # count of it, whose value at a slot is that slot's new index, plus one.
        stays = torch.ones(batch, n, dtype=torch.bool, device=hidden.device) if real is None else real.clone()
        stays = ops.put_(stays, before.slot, False, before.valid_if_padded)
        counted = ops.put_(stays, after.slot, True, after.valid_if_padded).cumsum(1)
        for row in range(batch):
            # In a trace (torch.jit.trace) lengths are tensors, one for all rows: `+=` would change it in place.
            lengths[row] = lengths[row] + after.sizes[row] - before.sizes[row]
        m = self.length - (self.length - max(lengths)) // self.bucket * self.bucket
        number, valid = torch.arange(1, m + 1, device=hidden.device)[None], None
        moved = counted - 1
        if min(lengths) < m or self.bucket > 1:
            # Shorter rows are padded on the left, so that the last token stays last: `generate` reads there.
            padding = (m - transfer.ints(lengths, hidden.device))[:, None]
            number, moved = number - padding, moved + padding
            valid = number > 0
        keep = ops.reaching(counted, number)
        self.alive = Alive(keep, valid) if alive is None else alive.pick(keep, valid, positions=not renumber)
        self._forget_shared()
        moved = moved.clamp(min=0)
        hidden, tokens = take(hidden, keep, 1), after.moved(moved)
        if tokens.bias is not None:
            bias = torch.zeros(batch, m, device=hidden.device)
            self.alive = replace(self.alive, bias=ops.put_(bias, tokens.slot, tokens.bias, tokens.valid_if_padded))
        if result.written is None:
            return hidden, tokens, moved
        return _written(hidden, tokens, result), tokens, moved

    def skip(self, before: Tokens, result: StageResult, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Let what a stage has dropped stay, and pass by the feed-forward; arguments as in `apply`.

        Returns:
            Hidden states ``[B, n, D]`` with what the stage has written, as many as came in.
        """
        after = result.tokens
        full = torch.empty(self.batch, self.length, device=hidden.device)
        self.skipping = Skipping.behind(before, after, self.alive, full, lengths)
        self._forget_shared()
        return hidden if result.written is None else _written(hidden.clone(), after, result)

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

    def adjust(self, kwargs: dict[str, Any], layer: CacheLayer | None, recurrent: bool = False) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, in that layer's own coordinates.

        Untouched where they are right already, which in most steps of decoding they are.

        Args:
            kwargs: as the text model gives them.
            layer: the layer's cache; None without.
            recurrent: the layer has a state instead of keys, and is given a mask of padding alone.
        """
        slots, mask = slots_of(layer), kwargs.get("attention_mask")
        every = self.alive is None and self.skipping is None
        if every and (slots is None or (mask is None and slots.plain)):
            return kwargs
        of = (mask, kwargs["position_embeddings"][0], kwargs.get("position_ids"), slots)
        window = window_of(layer)
        if recurrent:
            return {**kwargs, **self.recurrent.get(of, lambda: self._changes(kwargs, None, None, recurrent=True))}
        if layer is not None and window is not None:
            shared, stored = self.windowed, held_by(layer, window)
        else:
            shared, stored = self.changes, self._physical(layer) if self.static and layer is not None else 0
        return {**kwargs, **shared.get(of, lambda: self._changes(kwargs, layer, slots), stored)}

    def beside(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], per_token: Mapping[str, int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer, those of `Adapter.per_token` ``[B, L, ...]`` for the tokens that are left."""
        if self.alive is None or not per_token:
            return args, kwargs
        index = self.alive.index
        places = {place for place in per_token.values() if place < len(args) and args[place] is not None}
        names = [name for name in per_token if kwargs.get(name) is not None]
        args = tuple(take(value, index, 1) if place in places else value for place, value in enumerate(args))
        return args, {**kwargs, **{name: take(kwargs[name], index, 1) for name in names}}

    def store(self, layer: CacheLayer | None) -> None:
        """Tell a pruned layer's cache what it is about to store."""
        if layer is None or self.alive is None:
            return
        slots = slots_of(layer)
        forget(layer, self.length - self.alive.index.shape[1], self.slots.get((slots,), lambda: self._slots(slots)))

    def stored(self, layer: CacheLayer | None) -> int:
        """Tokens of earlier forwards that stand before this forward's keys in `layer`."""
        if layer is None:
            return 0
        slots, window = slots_of(layer), window_of(layer)
        if window is not None:
            return held_by(layer, window)
        if slots is None:
            return self.past
        return slots.cropped(self.past).origin.shape[1] + max(0, self.past - slots.tail)

    def biased(self, layer: CacheLayer | None) -> bool:
        """Whether some key that `layer` reads has a bias."""
        slots = slots_of(layer)
        return any(keys is not None and keys.bias is not None for keys in (self.alive, slots))

    def _forget_shared(self) -> None:
        for shared in (self.changes, self.windowed, self.recurrent, self.shifted, self.slots):
            shared.of, shared.value = (), None

    def _slots(self, slots: Slots | None) -> Slots:
        alive = self.alive
        assert alive is not None
        keys = stored_keys(slots, self.past, self.batch, alive.index.device)
        keys = keys.then(self.past + alive.index, alive.valid, alive.bias)
        shift = alive.shift if slots is None or slots.shift is None or alive.shift is not None else slots.shift
        return Slots(keys.origin, keys.valid, self.past + self.length, shift, keys.bias)

    def _mask(self, mask: Any, layer: CacheLayer | None, slots: Slots | None, dtype: torch.dtype) -> Mask | None:
        alive, device = self.alive, self.positions.device
        if mask is not None and not isinstance(mask, Mask):
            raise UnsupportedModelError(
                f"attention_mask of type {type(mask).__name__} reached a decoder layer; "
                "expected a tensor (sdpa, eager, flash) or a BlockMask (flex)"
            )
        now_plain = self.skipping is None and (alive is None or (alive.valid is None and alive.bias is None))
        if mask is None and now_plain and (slots is None or (slots.valid is None and slots.bias is None)):
            return None
        index = torch.arange(self.length, device=device).expand(self.batch, -1) if alive is None else alive.index
        valid, bias = (None, None) if alive is None else (alive.valid, alive.bias)
        window, first = window_of(layer), 0
        if window is not None and mask is not None:
            first = self.past + self.length - mask.shape[-1]
        if layer is None:  # without a cache a layer sees this forward alone
            keys = Keys(index, valid, bias)
        elif self.static and alive is None and slots is not None:
            keys = buffer_keys(slots, layer.max_cache_len)
        else:
            keys = stored_keys(slots, self.past, self.batch, device).then(self.past + index, valid, bias)
            if window is not None:  # which keeps the last keys alone
                keys = keys.last(held_by(layer, window) + index.shape[1])
            elif self.static:  # attention sees the whole buffer: what is free stands behind what has been written
                start, free = self.past + self.length, self._physical(layer) - keys.origin.shape[1]
                keys = keys.then(torch.arange(start, start + free, device=device).expand(self.batch, -1))
        rows = None if alive is None else alive.index
        queries = self.past + index
        hides = None if self.skipping is None else self.skipping.hides(keys.origin, self.past)
        return reduce_mask(
            mask, rows=rows, queries=queries, keys=keys, flash=self.flash, dtype=dtype, first=first, hides=hides
        )

    def _physical(self, layer: CacheLayer) -> int:
        """Slots in a static layer's buffer: a first prefill makes it smaller by what it has dropped so far."""
        size = int(layer.max_cache_len)
        if self.alive is None or self.past or (layer.is_initialized and not layer.shrunk):
            return size
        return size + int(layer.shrunk) - (self.length - self.alive.index.shape[1])

    def _padding(self, mask: Any) -> Tensor | None:
        """The mask ``[B, Q]`` of a recurrent layer, False on padding; None without."""
        alive = self.alive
        assert alive is not None
        if alive.bias is not None:
            raise UnsupportedModelError(
                "the recipe adds a bias to the survivors' keys (rectifier), and recurrent layers have no keys"
            )
        if alive.valid is not None and self.past:
            raise UnsupportedModelError(
                "samples that keep different numbers of tokens are padded, which would move the states that recurrent "
                "layers bring from earlier turns; keep a fixed count, or pass the turn's samples one by one"
            )
        if mask is None:
            return alive.valid
        own = take(mask, alive.index, 1)
        return own if alive.valid is None else own * alive.valid.to(own.dtype)

    def _changes(
        self, kwargs: dict[str, Any], layer: CacheLayer | None, slots: Slots | None, *, recurrent: bool = False
    ) -> dict[str, Any]:
        """Arguments that differ from those of the untouched layer."""
        rope, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        if self.alive is not None or self.skipping is not None:
            for name in PACKED:
                if kwargs.get(name) is not None:
                    raise UnsupportedModelError(
                        f"{name}: bounds of sequences packed into one row would be those of the whole prompt; "
                        "give each sequence a row of its own while a recipe is attached"
                    )
        if self.alive is not None:
            # A flash kernel would take gaps in the ids for packed sequences.
            rope, ids = self.alive.positioned(rope, None if self.flash else ids)
        elif slots is not None and slots.shift is not None:
            which = [shift is slots.shift for shift in self.shifts].index(True)
            rope, moved = self.shifted.get((rope[0],), lambda: self._shifted(rope[0]))[which]
            ids = moved if ids is not None and moved.dim() == 2 else ids
        mask = kwargs.get("attention_mask")
        mask = self._padding(mask) if recurrent else self._mask(mask, layer, slots, rope[0].dtype)
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


def _written(hidden: Tensor, tokens: Tokens, result: StageResult) -> Tensor:
    """Hidden states ``[B, n, D]`` with those that a stage has changed, at the slots of its `tokens`."""
    assert result.written is not None
    # Padding writes what stands at the first token anyway.
    rank = result.written.clamp(min=0) if result.written_padded else result.written
    states = ops.take_rows(tokens.hidden, rank).to(hidden.dtype)
    return ops.put_rows_(hidden, tokens.slot.gather(1, rank), states)
