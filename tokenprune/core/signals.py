"""What `Tokens` carries beside the tokens: the question, and signals recorded elsewhere in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenprune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tokenprune.core.needs import Needs


@dataclass(frozen=True, eq=False)
class Question:
    """The text tokens of the prompt behind its first image: those that may rate. T is the most of the batch."""

    embeddings: Tensor
    """``[B, T, D]`` as they enter the language model."""
    valid: Tensor
    """``[B, T]`` bool, False on padding."""
    padded: bool = True
    """Whether `valid` may be False anywhere: known on the host."""
    slot: Tensor | None = None
    """``[B, T]`` int64, index in the sequence at the place, as `Tokens.slot`; anything on padding."""
    states: Any = None
    """``[B, T, D]`` hidden states at the place, for parts that declare `Needs.question_states`."""
    keys: Any = None
    """``[B, T, Hkv, d]`` as the signal ``layer_keys``, for parts that declare `Needs.layer_keys` and the question."""

    @property
    def valid_if_padded(self) -> Tensor | None:
        """`valid`; None where it is known to be True throughout."""
        return self.valid if self.padded else None

    def seen_by(self, reads: Needs, reader: str) -> Question:
        """The same for a part that reads the question: hidden states and keys raise where it has not declared them."""
        states, keys = self.states, self.keys
        if not reads.question_states:
            states = Undeclared(reader, "hidden states of the question", "question_states=True")
        if not reads.layer_keys:
            keys = Undeclared(reader, "keys of the question", "question=True, layer_keys=True")
        return replace(self, states=states, keys=keys)

    def of(self, rows: Tensor | slice) -> Question:
        """The questions of these samples."""
        slot, states, keys = (x[rows] if isinstance(x, Tensor) else x for x in (self.slot, self.states, self.keys))
        embeddings, valid = self.embeddings[rows], self.valid[rows]
        return replace(self, embeddings=embeddings, valid=valid, slot=slot, states=states, keys=keys)

    def mean(self) -> Tensor:
        """Mean embedding ``[B, D]`` float32 of each sample's real text tokens; 0 where there are none."""
        if not self.padded:
            return self.embeddings.float().sum(1) / max(1, self.embeddings.shape[1])
        words = self.embeddings.float().masked_fill(~self.valid.unsqueeze(-1), 0.0).sum(1)
        return words / self.valid.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, eq=False)
class Signal:
    """Something recorded for each vision token elsewhere in the model, such as its input embedding."""

    value: Tensor
    """``[B, M, ...]``, one row for each recorded token."""
    valid: Tensor | None = None
    """``[B, M]`` bool, False on padding; None without."""
    origin: Tensor | None = None
    """``[B, M]`` int64, ascending: which original vision token each row belongs to. None: row i is original token i."""


class Seen(dict[str, Signal]):
    """The signals that one part may read; asked for another one, it says what the part has to declare."""

    declared: frozenset[str] = frozenset()
    reader: str = ""

    def __missing__(self, name: str) -> Signal:
        if name in self.declared:
            raise InputError(f"{self.reader} reads the signal {name!r}, which nothing has recorded here")
        raise _undeclared(name, self.declared, self.reader)


def _undeclared(name: str, declared: frozenset[str], reader: str) -> InputError:
    known = ", ".join(sorted(declared)) or "none"
    return InputError(
        f"{reader} reads the signal {name!r}, but declares {known}{did_you_mean(name, declared)}; "
        "state it in `reads = Needs(...)`"
    )


@dataclass(frozen=True, eq=False)
class Signals:
    """Signals by name, as one part may read them."""

    recorded: Mapping[str, Signal] = field(default_factory=dict)
    declared: frozenset[str] | None = None
    """Names that the part has declared; None: all."""
    reader: str = ""
    """The part, as messages call it."""

    def get(self, name: str) -> Signal | None:
        """The signal of that name; None where nobody recorded it.

        Raises:
            InputError: the part does not declare that it reads it.
        """
        if self.declared is not None and name not in self.declared:
            raise _undeclared(name, self.declared, self.reader)
        return self.recorded.get(name)

    def adding(self, more: Mapping[str, Signal]) -> Signals:
        """These signals and more of them."""
        return Signals({**self.recorded, **more}, self.declared, self.reader)

    def mapped(self, change: Callable[[str], Signal]) -> Signals:
        """The same names, as far as they may be read, with other signals."""
        names = [name for name in self.recorded if self.declared is None or name in self.declared]
        return Signals({name: change(name) for name in names}, self.declared, self.reader)

    def seen_by(self, declared: frozenset[str], reader: str) -> Signals:
        """The same for a part that has declared these names."""
        seen = Seen({name: self.recorded[name] for name in self.recorded if name in declared})
        seen.declared, seen.reader = declared, reader
        return Signals(seen, declared, reader)


class Unreadable:
    """Stands in for what cannot be read: any use but `is None` raises, so that nobody relies on it unnoticed.

    Args:
        told: the message.
    """

    def __init__(self, told: str) -> None:
        self._told = told

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for methods that an object need not have
            raise AttributeError(name)
        raise InputError(self._told)

    def __bool__(self) -> bool:
        raise InputError(self._told)

    def __call__(self, *args: object) -> Any:
        raise InputError(self._told)

    def __len__(self) -> int:
        raise InputError(self._told)

    def __iter__(self) -> Any:
        raise InputError(self._told)

    def __getitem__(self, key: object) -> Any:
        raise InputError(self._told)


class Undeclared(Unreadable):
    """Stands in for what a part has not declared to read."""

    def __init__(self, reader: str, what: str, declaration: str) -> None:
        super().__init__(f"{reader} reads {what}, but does not declare it; state it in `reads = Needs({declaration})`")
