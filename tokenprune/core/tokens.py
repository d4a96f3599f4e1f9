"""`Tokens`: the record of vision tokens that flows through the parts of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.errors import InputError

Grid = tuple[int, int, int]
"""Frames, rows and columns (T, H, W) of one image or video, in vision tokens."""

Count = int | Sequence[int]
"""How many vision tokens survive: one number for the whole batch, or one per sample."""


class Attention(Protocol):
    """Attention that the raters pay to the vision tokens at one place; see `core.attention.RaterAttention`."""

    def scores(
        self,
        raters: Tensor,
        *,
        rope: bool = True,
        normalise: Literal["all", "vision"] = "all",
        layer: Literal["previous", "next"] = "previous",
        gravity: bool = False,
    ) -> Tensor:
        """Rater-weighted mean of the attention rows: ``[B, H, N]`` float32, from rater weights ``[B, T]``."""
        ...

    def matrix(
        self,
        raters: Tensor,
        *,
        rope: bool = True,
        normalise: Literal["all", "vision"] = "all",
        layer: Literal["previous", "next"] = "previous",
    ) -> Tensor:
        """Head-mean attention of each rater: ``[B, T, N]`` float32; rows of text tokens with weight 0 are 0."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Vision tokens of a batch, with all that a part may need to know: B samples, N vision tokens, T text tokens.

    Samples with fewer vision tokens are padded on the right; `valid` marks the real ones. Real tokens stand in raster
    order (ascending `origin`). `sizes`, `total` and `grids` are plain Python numbers, so that a static schedule never
    waits for the device.
    """

    hidden: Tensor
    """``[B, N, D]`` hidden states of the vision tokens at this place."""
    valid: Tensor
    """``[B, N]`` bool, False on padding."""
    origin: Tensor
    """``[B, N]`` int64, index into the sample's original vision tokens, -1 on padding; after a merge the anchor's."""
    slot: Tensor
    """``[B, N]`` int64, index of the token in the sequence that the caller holds at this place; 0 on padding."""
    cell: Tensor
    """``[B, N, 3]`` int64: image (or frame), row and column of the token."""
    position: Tensor
    """``[B, N]`` or ``[3, B, N]`` original position ids."""
    mass: Tensor
    """``[B, N]`` float32, how many original tokens it stands for: 1 at the start, the sum after a merge."""
    text: Tensor
    """``[B, T, D]`` input embeddings of the text tokens that follow the (first) image: the candidates for raters."""
    text_valid: Tensor
    """``[B, T]`` bool, False on padding."""
    sizes: tuple[int, ...]
    """Real vision tokens per sample, now."""
    total: tuple[int, ...]
    """Original vision tokens per sample, before any stage."""
    grids: tuple[tuple[Grid, ...], ...]
    """Per sample, the (T, H, W) of each of its images."""
    text_padded: bool = True
    """Whether `text_valid` may be False anywhere: known on the host."""
    attention: Attention | None = None
    """Attention of raters over these tokens, where a language model surrounds the stage."""
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """Named tensors that a part asks for. ``vision_embedding`` ``[B, N0, D]``: the original vision tokens as they
    entered the language model (absent where `hidden` is just that); with ``vision_embedding_valid`` where padded."""

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        *,
        grid: Grid | tuple[int, int] | None = None,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
        attention: Attention | None = None,
        aux: Mapping[str, Tensor] | None = None,
    ) -> Tokens:
        """Tokens of a batch of equal single images, from plain tensors.

        Args:
            hidden: ``[B, N, D]`` vision tokens in raster order.
            grid: (H, W) or (T, H, W); a square when not given and N is a square, else one row.
            text: ``[B, T, D]`` embeddings of the text tokens after the image, none when not given.
            text_valid: ``[B, T]`` bool, all True when not given.

        Raises:
            InputError: `hidden` is not three-dimensional, or the grid does not multiply to N.
        """
        if hidden.dim() != 3:
            raise InputError(f"Tokens.from_hidden: hidden must be [B, N, D], got shape {tuple(hidden.shape)}")
        batch, n, width = hidden.shape
        shape = _grid_of(n, grid)
        index = torch.arange(n, device=hidden.device)
        cell = torch.stack([index // (shape[1] * shape[2]), index // shape[2] % shape[1], index % shape[2]], dim=-1)
        text = hidden.new_zeros(batch, 0, width) if text is None else text
        text_padded = text_valid is not None
        if text_valid is None:
            text_valid = torch.ones(text.shape[:2], dtype=torch.bool, device=hidden.device)
        rows = index.expand(batch, n)
        return cls(
            hidden=hidden,
            valid=torch.ones(batch, n, dtype=torch.bool, device=hidden.device),
            origin=rows,
            slot=rows,
            cell=cell.expand(batch, n, 3),
            position=rows,
            mass=torch.ones(batch, n, device=hidden.device),
            text=text,
            text_valid=text_valid,
            text_padded=text_padded,
            sizes=(n,) * batch,
            total=(n,) * batch,
            grids=((shape,),) * batch,
            attention=attention,
            aux=aux or {},
        )

    def counts(self, count: Count) -> tuple[int, ...]:
        """One count per sample from `count`, each checked to lie in 0 … the sample's number of tokens."""
        rows = (count,) * len(self.sizes) if isinstance(count, int) else tuple(count)
        if len(rows) != len(self.sizes):
            raise InputError(f"got {len(rows)} counts for a batch of {len(self.sizes)} samples")
        for row, (want, have) in enumerate(zip(rows, self.sizes, strict=True)):
            if not 0 <= want <= have:
                raise InputError(f"sample {row}: cannot keep {want} of {have} vision tokens")
        return rows

    @property
    def padded(self) -> bool:
        """Whether there is padding: known on the host."""
        return min(self.sizes, default=0) < self.valid.shape[1]

    @property
    def valid_if_padded(self) -> Tensor | None:
        """`valid`; None where it is True throughout, so that nobody need look at it."""
        return self.valid if self.padded else None

    @property
    def text_valid_if_padded(self) -> Tensor | None:
        """`text_valid`; None where it is known to be True throughout."""
        return self.text_valid if self.text_padded else None

    def only_valid(self, scores: Tensor) -> Tensor:
        """Scores ``[B, N]`` with -inf on padding."""
        return scores.masked_fill(~self.valid, -torch.inf) if self.padded else scores

    def take(self, index: Tensor, sizes: tuple[int, ...]) -> Tokens:
        """The tokens at `index` ``[B, K]`` (ascending, -1 where padded); other fields follow, text is untouched.

        Args:
            sizes: entries of each row of `index` that are no padding.
        """
        at, valid = index, self.valid[:, : index.shape[1]]
        if self.padded or min(sizes, default=0) < index.shape[1]:
            at, valid = index.clamp(min=0), index >= 0
        taken = replace(
            self,
            hidden=ops.take_rows(self.hidden, at),
            valid=valid,
            origin=self.origin.gather(1, at),
            slot=self.slot.gather(1, at),
            cell=ops.take_rows(self.cell, at),
            position=self.position.gather(-1, at.expand(*self.position.shape[:-1], at.shape[-1])),
            mass=self.mass.gather(1, at),
            sizes=sizes,
        )
        if not taken.padded:
            return taken
        gone = ~valid
        return replace(
            taken,
            origin=taken.origin.masked_fill(gone, -1),
            slot=taken.slot.masked_fill(gone, 0),
            mass=taken.mass.masked_fill(gone, 0.0),
        )

    def at_place(self, hidden: Tensor, attention: Attention | None) -> Tokens:
        """The same tokens with their hidden states out of the sequence ``[B, L, D]`` that stands at another place."""
        return replace(self, hidden=ops.take_rows(hidden, self.slot.to(hidden.device)), attention=attention)

    def moved(self, index: Tensor) -> Tokens:
        """The same tokens after their sequence was shortened: slot `s` of it became ``index[:, s]``."""
        return replace(self, slot=index.gather(1, self.slot))

    def check(self) -> Tokens:
        """Raise `InputError` unless every invariant of this record holds; return it. Waits for the device."""
        batch, n, width = self.hidden.shape
        expected = {
            "valid": (batch, n),
            "origin": (batch, n),
            "slot": (batch, n),
            "cell": (batch, n, 3),
            "mass": (batch, n),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(f"Tokens.{name}: expected shape {shape}, got {tuple(getattr(self, name).shape)}")
        if tuple(self.position.shape) not in {(batch, n), (3, batch, n)}:
            raise InputError(
                f"Tokens.position: expected {(batch, n)} or {(3, batch, n)}, got {tuple(self.position.shape)}"
            )
        if self.text.shape[:2] != self.text_valid.shape or self.text.shape[0] != batch or self.text.shape[2] != width:
            raise InputError(
                f"Tokens.text {tuple(self.text.shape)} does not fit text_valid {tuple(self.text_valid.shape)}"
            )
        if self.sizes != tuple(self.valid.sum(1).tolist()):
            raise InputError(f"Tokens.sizes {self.sizes} differs from the valid tokens {self.valid.sum(1).tolist()}")
        if not (self.text_padded or bool(self.text_valid.all())):
            raise InputError("Tokens.text_valid is False somewhere, but text_padded says that it is not")
        for row, size in enumerate(self.sizes):
            origin = self.origin[row, :size]
            if not bool(self.valid[row, :size].all()):
                raise InputError(f"Tokens, sample {row}: padding must stand on the right")
            if size and (int(origin[0]) < 0 or int(origin[-1]) >= self.total[row] or bool((origin.diff() <= 0).any())):
                raise InputError(f"Tokens, sample {row}: origin must ascend within 0 … {self.total[row] - 1}")
        return self


def _grid_of(n: int, grid: Grid | tuple[int, int] | None) -> Grid:
    if grid is None:
        side = int(n**0.5)
        return (1, side, side) if side * side == n else (1, 1, n)
    shape: Grid = (1, *grid) if len(grid) == 2 else grid
    if shape[0] * shape[1] * shape[2] != n:
        raise InputError(f"grid {grid} holds {shape[0] * shape[1] * shape[2]} tokens, but there are {n}")
    return shape
