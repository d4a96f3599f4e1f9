"""Autocast, kept out of a stage: what tokens are worth must not depend on how a model's own products are rounded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on the kind of `device`, while open: products of float32 stay float32."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def autocast_of_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What opens the autocast that is on now, later, where it has been turned off: for a model's own projections."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype=dtype)
