"""The tokens that still stand at a layer of a prefill, and the position ids that they have there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokenprune.core import ops
from tokenprune.engine.gather import take, take_positions, take_rope
from tokenprune.engine.projections import Rope
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import Anatomy
from tokenprune.pipeline import Pipeline


@dataclass(eq=False)
class Alive:
    """The tokens that still stand at the present layer of a prefill. L is the length of the untouched forward."""

    index: Tensor
    """``[B, n]`` their index within this forward, ascending; padding on the left repeats index 0."""
    valid: Tensor | None
    """``[B, n]`` bool, False on that padding; None when every row kept the same number."""
    numbered: Tensor | slice | None = None
    """Indices into the untouched prompt whose position ids these tokens now use, after renumbering: ``[B, n]``, or a
    slice; None: their own."""
    rope: Rope | None = None
    """Rotary tables after a stage with ``positions: renumber``, where the untouched forward's do not have them."""
    positions: Tensor | None = None
    """The position ids of these, ``[B, n]`` or ``[3, B, n]``."""
    shift: Tensor | None = None
    """``[B]`` subtract this from the position ids of all later tokens (decode steps)."""
    bias: Tensor | None = None
    """``[B, n]`` float32, added to the attention logits of every query with these keys; None: nothing is."""

    def pick(self, keep: Tensor, valid: Tensor | None, *, positions: bool) -> Alive:
        """The same after keeping the entries `keep` ``[B, m]`` of the present sequence, with or without `positions`."""
        picked = Alive(take(self.index, keep, 1), valid)
        if not positions:
            return picked
        if self.rope is not None and self.positions is not None:
            rope = take_rope(self.rope[0], keep), take_rope(self.rope[1], keep)
            return replace(picked, rope=rope, positions=take_positions(self.positions, keep), shift=self.shift)
        if isinstance(self.numbered, slice):
            return replace(picked, numbered=keep + self.numbered.start)
        return picked if self.numbered is None else replace(picked, numbered=take(self.numbered, keep, 1))

    def positioned(self, rope: Rope, ids: Tensor | None) -> tuple[Rope, Tensor | None]:
        """Their rotary tables and position ids.

        Args:
            rope: cos and sin of the untouched forward, ``[1 or B, L, d]`` or ``[3, B, L, d]``.
            ids: its position ids as a layer gets them; None if it gets none.
        """
        own = self.index if self.numbered is None else self.numbered
        cos, sin = rope
        if self.rope is not None:
            rope = self.rope
        elif isinstance(own, slice):
            rope = ops.in_memory(cos[..., own, :]), ops.in_memory(sin[..., own, :])
        else:
            rope = take_rope(cos, own), take_rope(sin, own)
        if ids is None:
            return rope, None
        if self.positions is not None and self.positions.dim() == 2:
            return rope, self.positions
        return rope, ids[..., own] if isinstance(own, slice) else take_positions(ids, own)


def refuse_numbers(anatomy: Anatomy, pipeline: Pipeline) -> None:
    """Raise `UnsupportedModelError` for position ids that one table of rotary embeddings cannot hold."""
    for stage in pipeline:
        if stage.positions == "renumber" and (anatomy.rotary_by_type or anatomy.counts_places):
            own = "types of layers have rotary embeddings of their own"
            scaled = "queries are scaled by their position ids"
            raise UnsupportedModelError(
                f"{stage.name} ({stage.place}): positions: renumber is not supported for {anatomy.adapter.title}, "
                f"whose {own if anatomy.rotary_by_type else scaled}; expected original"
            )
