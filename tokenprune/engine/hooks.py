"""Pre-hooks on decoder layers, removed while decoding needs no change of arguments.

Thirty hooks that return at once cost several per cent of a decode step, which is bound by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Hook = Callable[..., Any]
"""As `register_forward_pre_hook` takes it, with keyword arguments."""


class LayerHooks:
    """Pre-hooks on `layers` from the second one on, and whatever else is mounted with them.

    Args:
        layers: the decoder layers.
        hooks: of each layer that has one. The first layer's runs in any case, called by its owner.
        also: mounts other hooks beside them, and returns their handles.
    """

    def __init__(self, layers: Any, hooks: Mapping[int, Hook], also: Callable[[], list[Any]]) -> None:
        self.layers = layers
        self.hooks = hooks
        self.also = also
        self.mounted = False
        """A plain bool, since torch.compile cannot trace a look at handles."""
        self._handles: list[Any] = []

    def mount(self) -> None:
        """Put them there, if they are not: before all others, which then see what the layer will."""
        if self.mounted:
            return
        self.mounted = True
        self._handles = self.also()
        for index, hook in self.hooks.items():
            if index:
                handle = self.layers[index].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                self._handles.append(handle)

    def unmount(self) -> None:
        """Take them off. Not while one of them runs."""
        if not self.mounted:
            return
        self.mounted = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
