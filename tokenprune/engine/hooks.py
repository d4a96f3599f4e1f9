"""Hooks on modules that the model may exchange meanwhile, and those of the decoder layers, which come and go.

Thirty hooks that return at once cost several per cent of a decode step, which is bound by the host. So the layers' are
removed while decoding needs no change of arguments, unless the forward of another thread needs them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from tokenprune.engine.state import State, Threads
from tokenprune.engine.traces import Handle

Spot = tuple[nn.Module, Callable[[nn.Module], Handle]]
"""A module, and what puts a hook on it."""


class Hooks:
    """Hooks that can be put up and taken off together.

    Args:
        spots: where they belong in the model as it now is; always as many, in the same order.
    """

    def __init__(self, spots: Callable[[], Sequence[Spot]]) -> None:
        self.spots = spots
        self._on: list[tuple[nn.Module, Handle]] = []

    def mount(self) -> None:
        """Put them up."""
        self._on = [(module, hook(module)) for module, hook in self.spots()]

    def unmount(self) -> None:
        """Take them off."""
        for _, handle in self._on:
            handle.remove()
        self._on = []

    def follow(self) -> bool:
        """Move hooks of modules that have left the model to those in their place; True if any have."""
        moved = False
        if not self._on:
            return moved
        for number, ((before, handle), (module, hook)) in enumerate(zip(self._on, self.spots(), strict=True)):
            if module is not before:
                handle.remove()
                self._on[number] = module, hook(module)
                moved = True
        return moved


class LayerHooks(Hooks):
    """Hooks that are there while some thread's forward needs them.

    While hooks come or go, another thread may be about to call them, and has looked up only half of what it should know
    of them. So they must take a call without keyword arguments, and leave such a forward alone: it does not need them.

    Args:
        spots: as in `Hooks`.
        threads: whose forwards.
    """

    def __init__(self, spots: Callable[[], Sequence[Spot]], threads: Threads) -> None:
        super().__init__(spots)
        self.threads = threads
        self.mounted = False
        """A plain bool, since torch.compile cannot trace a look at handles."""

    def need(self, state: State) -> None:
        """The forward of `state` needs them, until it ends: put them there, if they are not."""
        state.needs_hooks = True
        if self.mounted and torch.compiler.is_compiling():
            return  # a lock cannot be traced; compiled forwards keep them for ever
        with self.threads.lock:
            self.mount()

    def spare(self, state: State) -> None:
        """The forward of `state` does not need them: take them off, if no other thread's does. Not while one runs."""
        state.needs_hooks = False
        if self.mounted:
            with self.threads.lock:
                if not self.threads.others_need_hooks():
                    self.unmount()

    def mount(self) -> None:
        if not self.mounted:
            super().mount()
            self.mounted = True

    def unmount(self) -> None:
        self.mounted = False
        super().unmount()


def by_name(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call of `module`, those without a name under theirs."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs} if args else kwargs


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Of the arguments of a method, in order, without the module itself."""
    return tuple(inspect.signature(forward).parameters)[1:]


def forget_compiled() -> None:
    """Drop compiled code: torch.compile does not notice hooks that come or go later (pytorch/pytorch#117758)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
