"""`Tokens`: the record of vision tokens that flows through the parts of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.grids import Grid, grid_of
from tokenprune.core.signals import Question, Signal, Signals, Undeclared, Unreadable
from tokenprune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tokenprune.core.needs import Needs

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


Glimpse = Callable[[Tensor], Tensor]
"""Attention that one more position behind the prompt would pay to the vision tokens, head by head: ``[B, H, N]``
float32, 0 on padding, summing to 1 over N. Its vectors ``[layers, D]`` are the argument: the first enters the first
decoder layer, each further one is added to its hidden state before the layer of that number; those of later layers than
the one that is read are left alone. The prompt does not see it."""


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
    """``[B, N, 3]`` int64: image (or frame), row and column of the token, for parts that declare ``grid=True``."""
    position: Tensor
    """``[B, N]`` or ``[3, B, N]`` original position ids."""
    mass: Tensor
    """``[B, N]`` float32, how many original tokens it stands for: 1 at the start, the sum after a merge."""
    question: Question
    """The text tokens behind the first image, which may rate."""
    sizes: tuple[int, ...]
    """Real vision tokens per sample, now."""
    total: tuple[int, ...]
    """Original vision tokens per sample, before any stage."""
    grids: tuple[tuple[Grid, ...], ...]
    """Per sample, the (T, H, W) of each of its images, for parts that declare ``grid=True``."""
    bias: Tensor | None = None
    """``[B, N]`` float32, added to the logits of all later attention to this token (`tokenprune.parts.rectifiers`);
    None: nothing is added anywhere."""
    attention: Attention | None = None
    """Attention of raters over these tokens, where a language model surrounds the stage."""
    signals: Signals = field(default_factory=Signals)
    """What was recorded elsewhere in the model, read by `signal` and `original`."""
    glimpse: Glimpse | None = None
    """What a position behind the prompt would look at, where decoder layers have run below the stage. For parts that
    declare ``glimpse=True``."""
    projector: Callable[[Tensor], Tensor] | None = None
    """Makes rows ``[B, M, D]`` of what the projector reads of a token, ``[B, M, width of the tower]``; None where it
    does not take tokens one by one. For parts that declare ``projector=True``."""

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        *,
        grid: Grid | tuple[int, int] | None = None,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
        text_states: Tensor | None = None,
        text_keys: Tensor | None = None,
        attention: Attention | None = None,
        signals: Mapping[str, Tensor] | None = None,
        glimpse: Glimpse | None = None,
    ) -> Tokens:
        """Tokens of a batch of equal single images, from plain tensors.

        Args:
            hidden: ``[B, N, D]`` vision tokens in raster order.
            grid: (H, W) or (T, H, W); a square when not given and N is a square, else one row.
            text: ``[B, T, D]`` embeddings of the text tokens after the image, none when not given.
            text_valid: ``[B, T]`` bool, all True when not given.
            text_states: ``[B, T, D]`` their hidden states at this place; the embeddings when not given.
            text_keys: ``[B, T, ...]`` their keys in the layer that has run, for parts that read ``layer_keys``.
            attention: of raters over the tokens, for parts that read it (`tokenprune.core.attention`).
            signals: what parts read by name, ``[B, N, ...]`` each, such as ``embedding``.
            glimpse: what a position behind the prompt would look at, for parts that bring one.

        Raises:
            InputError: `hidden` is not three-dimensional, or the grid does not multiply to N.
        """
        if hidden.dim() != 3:
            raise InputError(f"Tokens.from_hidden: hidden must be [B, N, D], got shape {tuple(hidden.shape)}")
        batch, n, width = hidden.shape
        shape = grid_of(n, grid)
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
            question=Question(
                text,
                text_valid,
                text_padded,
                slot=torch.arange(n, n + text.shape[1], device=hidden.device).expand(batch, -1),
                states=text if text_states is None else text_states,
                keys=text_keys,
            ),
            sizes=(n,) * batch,
            total=(n,) * batch,
            grids=((shape,),) * batch,
            attention=attention,
            glimpse=glimpse,
            signals=Signals({name: Signal(value) for name, value in (signals or {}).items()}),
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

    def signal(self, name: str) -> Tensor:
        """What was recorded for these tokens: ``[B, N, ...]``, anything on padding.

        Args:
            name: ``embedding``, one of `tokenprune.core.needs.TOWER`, or ``earlier_1`` and so on.

        Raises:
            InputError: nobody recorded it, or the part that asks has not declared it.
        """
        found = self.signals.get(name)
        if found is None and name == "embedding":
            return self.hidden  # nothing has run yet: hidden states are the embeddings
        found = self.original(name)
        if found.origin is None:
            return ops.take_rows(found.value, self.origin.clamp(min=0) if self.padded else self.origin)
        return ops.take_rows(found.value, torch.searchsorted(found.origin, self.origin.clamp(min=0)))

    def original(self, name: str) -> Signal:
        """What was recorded for all tokens at once, those that are gone included; errors as in `signal`."""
        found = self.signals.get(name)
        if found is not None:
            return found
        if name == "embedding":
            return Signal(self.hidden, self.valid_if_padded)
        known = ", ".join(sorted(self.signals.recorded)) or "none"
        raise InputError(
            f"the signal {name!r} was not recorded here{did_you_mean(name, self.signals.recorded)}; "
            f"recorded: {known}. Give Tokens.from_hidden(signals=...) in a model of your own"
        )

    def seen_by(self, reads: Needs, reader: str) -> Tokens:
        """The same record for one part: what it has not declared to read raises when it is read.

        Args:
            reads: what it has declared.
            reader: the part, as messages call it.
        """
        question: Any = self.question
        attention: Any = self.attention
        if not reads.question:
            question = Undeclared(reader, "the question", "question=True")
        else:
            question = question.seen_by(reads, reader)
        if not reads.attention:
            attention = Undeclared(reader, "attention", 'attention="previous"')
        signals = self.signals.seen_by(reads.signals, reader)
        glimpse: Any = self.glimpse
        if not reads.glimpse and glimpse is not None:
            glimpse = Undeclared(reader, "a glimpse behind the prompt", "glimpse=True")
        projector: Any = self.projector
        if not reads.projector and projector is not None:
            projector = Undeclared(reader, "the projector", "projector=True")
        told = {"question": question, "attention": attention, "signals": signals}
        seen = _changed(self, **told, glimpse=glimpse, projector=projector)
        return seen if reads.grid else seen.without_grid(reader)

    def without_grid(self, reader: str) -> Tokens:
        """The same record for a part that has not declared to read grids; arguments as in `seen_by`."""
        undeclared: Any = Undeclared(reader, "the grids of the pictures", "grid=True")
        return _changed(self, cell=undeclared, grids=(undeclared,) * len(self.total))

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
        taken = _changed(
            self,
            hidden=ops.take_rows(self.hidden, at),
            valid=valid,
            origin=self.origin.gather(1, at),
            slot=self.slot.gather(1, at),
            cell=self.cell if isinstance(self.cell, Unreadable) else ops.take_rows(self.cell, at),
            position=self.position.gather(-1, at.expand(*self.position.shape[:-1], at.shape[-1])),
            mass=self.mass.gather(1, at),
            bias=None if self.bias is None else self.bias.gather(1, at),
            sizes=sizes,
        )
        if not taken.padded:
            return taken
        gone = ~valid
        return _changed(
            taken,
            origin=taken.origin.masked_fill(gone, -1),
            slot=taken.slot.masked_fill(gone, 0),
            mass=taken.mass.masked_fill(gone, 0.0),
            bias=None if taken.bias is None else taken.bias.masked_fill(gone, 0.0),
        )

    def at_place(
        self,
        hidden: Tensor,
        attention: Attention | None,
        signals: Mapping[str, Signal] | None = None,
        question: Question | None = None,
        glimpse: Glimpse | None = None,
    ) -> Tokens:
        """The same tokens at another place of the model.

        Args:
            hidden: ``[B, L, D]`` the sequence that stands there; their states are taken out of it.
            attention: of raters over them, where a stage asks for it.
            signals: recorded for this place, beside those that they carry.
            question: as it is at this place; as they carry it when left out.
            glimpse: behind the prompt at this place, where a stage asks for it.
        """
        here = self.signals.adding(signals) if signals else self.signals
        states = ops.take_rows(hidden, self.slot.to(hidden.device))
        asked = self.question if question is None else question
        return _changed(self, hidden=states, attention=attention, signals=here, question=asked, glimpse=glimpse)

    def moved(self, index: Tensor) -> Tokens:
        """The same tokens after their sequence was shortened: slot `s` of it became ``index[:, s]``."""
        return _changed(self, slot=index.gather(1, self.slot))

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
            if name == "cell" and isinstance(self.cell, Unreadable):
                continue
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(f"Tokens.{name}: expected shape {shape}, got {tuple(getattr(self, name).shape)}")
        if tuple(self.position.shape) not in {(batch, n), (3, batch, n)}:
            raise InputError(
                f"Tokens.position: expected {(batch, n)} or {(3, batch, n)}, got {tuple(self.position.shape)}"
            )
        text, text_valid = self.question.embeddings, self.question.valid
        if text.shape[:2] != text_valid.shape or text.shape[0] != batch or text.shape[2] != width:
            raise InputError(f"Tokens.question {tuple(text.shape)} does not fit its valid {tuple(text_valid.shape)}")
        if self.bias is not None and tuple(self.bias.shape) != (batch, n):
            raise InputError(f"Tokens.bias: expected shape {(batch, n)}, got {tuple(self.bias.shape)}")
        if self.sizes != tuple(self.valid.sum(1).tolist()):
            raise InputError(f"Tokens.sizes {self.sizes} differs from the valid tokens {self.valid.sum(1).tolist()}")
        if not (self.question.padded or bool(text_valid.all())):
            raise InputError("Tokens.question.valid is False somewhere, but `padded` says that it is not")
        for row, size in enumerate(self.sizes):
            origin = self.origin[row, :size]
            if not bool(self.valid[row, :size].all()):
                raise InputError(f"Tokens, sample {row}: padding must stand on the right")
            if size and (int(origin[0]) < 0 or int(origin[-1]) >= self.total[row] or bool((origin.diff() <= 0).any())):
                raise InputError(f"Tokens, sample {row}: origin must ascend within 0 … {self.total[row] - 1}")
        return self


def _changed(tokens: Tokens, **fields: Any) -> Tokens:
    """`dataclasses.replace` in a third of its time: a stage changes its tokens often, and is bound by the host."""
    if torch.compiler.is_compiling():
        return replace(tokens, **fields)
    changed = object.__new__(Tokens)
    changed.__dict__.update(tokens.__dict__, **fields)
    return changed
