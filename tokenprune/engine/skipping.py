"""Tokens that stay in the sequence and pass by the feed-forward of every layer (``dropped: skip_ffn``).

Nothing is shortened for the layer itself, whose attention they take part in. Hooks on its feed-forward take out the
rows of the others before, and put what comes out back behind it, with 0 for those that skip: the layer adds that to
its residual, so they pass unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.tokens import Tokens
from tokenprune.engine.alive import Alive
from tokenprune.engine.gather import take


@dataclass(frozen=True, eq=False)
class Skipping:
    """Which tokens skip, from the stage's layer to the end of a prefill. L is the length of the untouched forward, n
    that of the present sequence."""

    through: Tensor
    """``[B, k]`` index in the present sequence of the tokens that go through the feed-forward; 0 on padding."""
    valid: Tensor | None
    """``[B, k]`` bool, False on padding, where rows have different numbers of them; None without."""
    text: Tensor
    """``[B, n]`` bool: the tokens that do not see those that skip."""
    gone: Tensor
    """``[B, L]`` bool, by index in the untouched forward: the tokens that skip."""
    left: Alive
    """What stands in the caches once the prefill is over."""

    @classmethod
    def behind(
        cls, before: Tokens, after: Tokens, alive: Alive | None, full: Tensor, lengths: Sequence[int]
    ) -> Skipping:
        """What skips behind a stage.

        Args:
            before: the tokens that came in; `slot` is their index in the present sequence.
            after: those that the stage has kept.
            alive: the tokens that stand in the present sequence; None: all.
            full: ``[B, L]``, for shape and device.
            lengths: tokens of each row of the present sequence.
        """
        real = torch.ones_like(full, dtype=torch.bool) if alive is None else alive.valid
        if real is None:
            real = torch.ones_like(alive.index, dtype=torch.bool)  # type: ignore[union-attr]
        text = ops.put_(real.clone(), before.slot, False, before.valid_if_padded)
        goes = ops.put_(text.clone(), after.slot, True, after.valid_if_padded)
        counts = [n + k - size for n, k, size in zip(lengths, after.sizes, before.sizes, strict=True)]
        through = ops.places(goes, counts)
        valid = through >= 0 if ops.ragged(counts) else None
        through = through.clamp(min=0)
        skips = real & ~goes
        if alive is None:
            return cls(through, valid, text, skips, Alive(through, valid))
        gone = ops.put_(torch.zeros_like(full, dtype=torch.bool), alive.index, skips, alive.valid)
        return cls(through, valid, text, gone, Alive(take(alive.index, through, 1), valid))

    def hides(self, origin: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """The queries ``[B, n]`` and the keys ``[B, K]`` that do not see each other, as bool.

        Args:
            origin: ``[B, K]`` index of each key's token in the untouched sequence.
            past: tokens that came before this forward.
        """
        own = (origin - past).to(self.gone.device)
        here = (own >= 0) & (own < self.gone.shape[1])
        return self.text, take(self.gone, own.clamp(min=0, max=self.gone.shape[1] - 1), 1) & here

    def shortened(self, hidden: Tensor) -> Tensor:
        """Of ``[B, n, D]`` the rows that go through, ``[B, k, D]``."""
        return take(hidden, self.through, 1)

    def lengthened(self, rows: Tensor) -> Tensor:
        """``[B, n, D]`` of the rows that went through, ``[B, k, D]``: 0 for those that skip."""
        full = rows.new_zeros(rows.shape[0], self.text.shape[1], rows.shape[2])
        valid = None if self.valid is None else self.valid.to(rows.device)
        return ops.put_rows_(full, self.through.to(rows.device), rows, valid)
