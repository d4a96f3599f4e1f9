"""Arguments of a call that name places of its prompt (`labels`, `logits_to_keep`), when the prompt gets shorter inside.

They are taken out of the call, and applied to what the language model returns: only there is it known who survived.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core import ops
from tokenprune.engine.alive import Alive
from tokenprune.errors import InputError

IGNORED = -100
"""The label of a token that does not count, unless the call says otherwise (``ignore_index``)."""


@dataclass(eq=False)
class Asked:
    """What one call of the model asks of places in its prompt."""

    labels: Tensor | None
    """``[B, L]``, or of the kept logits where `keep` is given."""
    keep: Tensor | int | None
    """Which logits are wanted: a tensor as transformers takes it, or the last so many; None or 0: all."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Arguments that the model hands on to its loss."""
    alive: Alive | None = None
    """Who survived; None: all."""

    def answered(self, hidden: Tensor, alive: Alive | None, length: int) -> Tensor:
        """The language model's output ``[B, m, D]``, at the places asked for: ``[B, K, D]``.

        Args:
            hidden: of the survivors.
            alive: the survivors of this forward; None: all.
            length: L, its tokens before any stage.

        Raises:
            InputError: a place beyond the prompt, or of a token that was dropped.
        """
        self.alive = alive
        if isinstance(self.keep, Tensor):
            keep = self.keep.to(hidden.device)
            if keep.dtype == torch.bool and keep.dim() == 2:  # other numbers of places in each sample: one row of all
                sample, place = keep.nonzero(as_tuple=True)
                if alive is not None:
                    place = _survivors(alive, _within(place[None], length)[0], length, sample)
                return hidden[sample, place][None]
            if keep.dtype == torch.bool:
                keep = keep.nonzero()[:, 0]
            place = _within(keep.expand(hidden.shape[0], -1), length)
            return ops.take_rows(hidden, place if alive is None else _survivors(alive, place, length))
        if self.keep:
            last = torch.arange(max(0, length - self.keep), length, device=hidden.device)
            if alive is not None:
                _survivors(alive, last.expand(hidden.shape[0], -1), length)
            return hidden[:, -self.keep :]
        return hidden

    def behind(self, before: int, length: int) -> Asked:
        """The same for a call of `length` tokens, as the last of a prompt of which `before` have come earlier."""
        labels, keep, extra = self.labels, self.keep, dict(self.extra)
        ignored = extra.get("ignore_index", IGNORED)
        if isinstance(keep, Tensor):
            places = keep.dtype != torch.bool
            keep = _within(keep, length) + before if places else torch.nn.functional.pad(keep, (before, 0))
        elif keep:
            keep = min(keep, length)
        elif labels is not None:  # what follows the earlier tokens is no part of this call's loss
            labels = torch.nn.functional.pad(labels[:, 1:], (before + 1, 0), value=ignored)
            if extra.get("shift_labels") is not None:
                extra["shift_labels"] = torch.nn.functional.pad(extra["shift_labels"], (before, 0), value=ignored)
        return Asked(labels, keep, extra)

    @property
    def flat(self) -> bool:
        """Whether the logits are wanted in one row ``[places, V]``, as transformers gives them for a mask by sample."""
        return isinstance(self.keep, Tensor) and self.keep.dtype == torch.bool and self.keep.dim() == 2

    def loss(self, model: Any, logits: Tensor) -> Tensor:
        """The model's own loss of `logits` ``[B, m, V]``: of those labels whose logits are there, which must be all.

        Raises:
            InputError: the token before a label was dropped.
        """
        labels, extra = self.labels, dict(self.extra)
        if self.alive is not None and not self.keep_given:
            ignored = extra.get("ignore_index", IGNORED)
            assert labels is not None
            following = _left_shifted(labels, ignored)
            left = _of_survivors(self.alive, following, ignored)
            labels = torch.nn.functional.pad(left[:, :-1], (1, 0), value=ignored)
            kept = labels
            if extra.get("shift_labels") is not None:  # the loss reads these alone
                following = extra["shift_labels"]
                kept = extra["shift_labels"] = _of_survivors(self.alive, following, ignored)
            lost = int((following != ignored).sum()) - int((kept != ignored).sum())
            if lost:
                raise InputError(
                    f"labels: {lost} stand behind a vision token that the recipe has dropped, so nothing predicts "
                    "them; the loss would be another. Set the labels of vision tokens, and of the "
                    f"token behind a picture, to {ignored}"
                )
        vocabulary = model.config.get_text_config().vocab_size
        loss: Tensor = model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **extra)
        return loss

    @property
    def keep_given(self) -> bool:
        """Whether logits, and labels with them, are of chosen places."""
        return isinstance(self.keep, Tensor) or bool(self.keep)


def asked_of(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Asked | None, dict[str, Any]]:
    """What a call with these arguments asks of places in its prompt, if anything, and the call without that."""
    labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep")
    chosen = isinstance(keep, Tensor)
    if labels is None and not chosen and (keep is None or int(keep) < 2):
        return None, dict(kwargs)
    known = inspect.signature(type(model).forward).parameters
    extra = {name: value for name, value in kwargs.items() if name not in known}
    call = {name: value for name, value in kwargs.items() if name != "labels"}
    return Asked(labels, keep, extra), {**call, "logits_to_keep": 0} if chosen else call


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The language model's output with other last hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


def answer(asked: Asked, model: nn.Module, output: Any) -> Any:
    """The model's output, with the loss and the shape of logits that the call has asked for."""
    plain = isinstance(output, tuple)
    logits = output[0] if plain else output.logits
    loss = None if asked.labels is None else asked.loss(model, logits)
    logits = logits[0] if asked.flat else logits
    if plain:
        return (*(() if loss is None else (loss,)), logits, *output[1:])
    return type(output)(**{**output, "loss": loss, "logits": logits})


def _within(place: Tensor, length: int) -> Tensor:
    """Places ``[B, K]`` counted from the front; raises `InputError` for those beyond the prompt."""
    place = torch.where(place < 0, place + length, place)
    if bool(((place < 0) | (place >= length)).any()):
        raise InputError(
            f"logits_to_keep: expected places in -{length} … {length - 1}, as the call has {length} tokens"
        )
    return place


def _survivors(alive: Alive, place: Tensor, length: int, sample: Tensor | None = None) -> Tensor:
    """Where the tokens at `place` ``[B, K]`` (or ``[K]``, of these samples) of the untouched sequence stand now."""
    index = alive.index if alive.valid is None else alive.index.masked_fill(~alive.valid, -1)
    if sample is None:
        found = torch.searchsorted(index.contiguous(), place.contiguous())
        right = index.gather(1, found.clamp(max=index.shape[1] - 1)) == place
    else:
        found = (index[sample] < place[:, None]).sum(1)
        right = index[sample, found.clamp(max=index.shape[1] - 1)] == place
    if not bool(right.all()):
        gone = int(place[~right][0])
        raise InputError(
            f"logits_to_keep: the token at place {gone} of {length} is a vision token that the recipe has dropped, and "
            "has no logits; ask for text tokens, or for the kept ones that report.stages names"
        )
    return found


def _left_shifted(labels: Tensor, ignored: int) -> Tensor:
    """The label that follows each token, ``[B, L]``."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)


def _of_survivors(alive: Alive, following: Tensor, ignored: int) -> Tensor:
    """Of the labels that follow each token, ``[B, L]``, those that follow survivors, ``[B, m]``."""
    if following.shape[1] <= int(alive.index.max()):
        raise InputError(f"labels: expected one for each token of the call, got {tuple(following.shape)}")
    left = following.to(alive.index.device).gather(1, alive.index)
    return left if alive.valid is None else left.masked_fill(~alive.valid, ignored)
