"""Copies between the host and the device that do not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def ints(values: Sequence[int], device: torch.device) -> Tensor:
    """Python ints as int64 ``[B]`` on `device`, made there: a copy from the host would wait for it."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    return torch.cat([torch.full((1,), value, dtype=torch.int64, device=device) for value in values])


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` from the host on `device`; the copy does not wait for the device."""
    if device.type == "cuda":  # from pageable memory it would
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def download(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy `x` to the host.

    The function returned blocks until this copy is done, but not until work queued later is done.
    """
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        here = x.cpu()
        return lambda: here
    host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
