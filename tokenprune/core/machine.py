"""What is installed on this machine and how much memory is free: told without transformers, which may not import."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def installed(name: str) -> str | None:
    """The version of a distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torchvision_conflict() -> str | None:
    """What is wrong with a torchvision that was built for another torch; None without one, or where it works.

    transformers cannot be imported beside it: it asks whether torchvision is installed, not whether it works.
    """
    if installed("torchvision") is None:
        return None
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        pair = f"torchvision {installed('torchvision')} does not go with torch {installed('torch')}"
        return f"{pair} ({str(error).splitlines()[0]}): uninstall it, or take it from where that torch came from"
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.is_file():
        return None
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
