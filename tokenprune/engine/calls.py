"""What a module was called with, by the names of its forward: callers pass the same argument by place or by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module`, by name."""
    if not args:
        return kwargs
    return {**dict(zip(names(module), args, strict=False)), **kwargs}


def names(module: nn.Module) -> list[str]:
    """What the forward of `module` calls its arguments, in order."""
    return list(inspect.signature(module.forward).parameters)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of `module` names this argument."""
    return name in names(module)
