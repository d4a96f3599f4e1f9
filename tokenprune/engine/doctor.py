"""What this machine has, what may go wrong with it, and what a model can run: the facts behind `tokenprune doctor`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import torch
from packaging.requirements import Requirement

from tokenprune.core.machine import free_memory, installed, torchvision_conflict
from tokenprune.errors import TokenPruneError
from tokenprune.recipe import list_recipes

PACKAGES = ("torch", "transformers", "numpy", "pillow", "torchvision", "flash-attn", "accelerate", "peft")
"""Whose version decides what works; the first two are the ones that most faults come from."""


def machine() -> dict[str, Any]:
    """Versions, attention implementations, devices, and conflicts."""
    return {"versions": _versions(), "attention": _attention(), "devices": _devices(), "conflicts": _conflicts()}


def runs(config: Any) -> dict[str, Any]:
    """What is known of a model with this configuration, and which recipes run on it.

    Raises:
        UnsupportedModelError: a family that nobody adapted.
    """
    # Not above: `machine` tells what is wrong where transformers cannot be imported.
    from transformers import AutoModelForImageTextToText

    from tokenprune.engine.attach import attach
    from tokenprune.families.catalogue import adapter_of

    adapter = adapter_of(config, asker="doctor")
    with torch.device("meta"):  # no weights: hooks are mounted on the shape alone
        network = AutoModelForImageTextToText.from_config(config)
    refused: dict[str, str] = {}
    for recipe in list_recipes():
        try:
            attach(network, recipe).detach()
        except TokenPruneError as error:
            refused[recipe] = str(error).removeprefix(f"{recipe}: ")
    return {
        "model_type": adapter.family,
        "family": adapter.title,
        "layers": config.get_text_config().num_hidden_layers,
        "runs": [recipe for recipe in list_recipes() if recipe not in refused],
        "refused": refused,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | {name: installed(name) for name in PACKAGES}


def _attention() -> dict[str, bool]:
    """Attention implementations of transformers, and whether a model can be loaded with them here."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    return {
        "sdpa": True,
        "eager": True,
        "flex_attention": bool(is_torch_flex_attn_available()),
        "flash_attention_2": bool(is_flash_attn_2_available()),
    }


def _devices() -> list[dict[str, Any]]:
    cpu = torch.device("cpu")
    found: list[dict[str, Any]] = [
        {"name": "cpu", "about": _threads(torch.get_num_threads()), "free_bytes": free_memory(cpu)}
    ]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        for index in range(torch.accelerator.device_count()):
            where = torch.device(kind, index)
            about = torch.cuda.get_device_name(index) if kind == "cuda" else kind
            found.append({"name": str(where), "about": about, "free_bytes": free_memory(where)})
    return found


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _conflicts() -> list[str]:
    """What is installed in versions that were never tried, or that do not go together."""
    found = []
    for text in _requirements():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        got = installed(wanted.name)
        if got is None:
            found.append(f"{wanted.name} is not installed; tokenprune needs {wanted.specifier}")
        elif not wanted.specifier.contains(got, prereleases=True):
            found.append(f"{wanted.name} {got} is installed; tokenprune was tested with {wanted.specifier}")
    if (conflict := torchvision_conflict()) is not None:
        found.append(conflict)
    return found


def _requirements() -> list[str]:
    """What the installed package asks for; nothing where it runs from a checkout that is not installed."""
    try:
        return requires("tokenprune-vlm") or []
    except PackageNotFoundError:
        return []
