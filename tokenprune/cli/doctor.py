"""`tokenprune doctor`: what this machine has, what may go wrong with it, and what a model can run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

import typer

from tokenprune import __version__
from tokenprune.cli.options import Json
from tokenprune.cli.terminal import console, print_json, progress, table
from tokenprune.errors import TokenPruneError, UnsupportedModelError

NAME = "doctor"
EXAMPLES = (
    "  tokenprune doctor",
    "  tokenprune doctor my-llava/",
    "  tokenprune doctor --json            to paste into a bug report",
)
PACKAGES = ("torch", "transformers", "numpy", "pillow", "torchvision", "flash-attn", "accelerate", "peft")
"""Whose version decides what works; the first two are the ones that most faults come from."""


def command(
    model: Annotated[
        str | None, typer.Argument(help="'embedded', a published shape, a folder or a hub id; weights are not read.", metavar="[MODEL]")
    ] = None,
    json_: Json = False,
) -> None:
    """Tell versions, attention kernels and devices, known conflicts, and which recipes a model can run.

    Paste its output into a bug report. Ends with status 1 if something that it found stands in the way.
    """
    with progress("looking around"):
        facts: dict[str, Any] = {
            "versions": _versions(),
            "attention": _attention(),
            "devices": _devices(),
            "conflicts": _conflicts(),
        }
    if model is not None:
        with progress(f"trying every recipe on the shape of {model}"):
            facts["model"] = _model(model)
    if json_:
        print_json(facts)
    else:
        _show(facts)
    if facts["conflicts"] or not facts.get("model", {}).get("supported", True):
        raise typer.Exit(1)


def _versions() -> dict[str, str | None]:
    import platform

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "tokenprune": __version__,
    }
    return found | {name: _installed(name) for name in PACKAGES}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
    import torch

    from tokenprune.families.sketch import free_memory

    cpu = torch.device("cpu")
    found: list[dict[str, Any]] = [
        {"name": "cpu", "about": f"{torch.get_num_threads()} threads", "free_bytes": free_memory(cpu)}
    ]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        for index in range(torch.accelerator.device_count()):
            where = torch.device(kind, index)
            about = torch.cuda.get_device_name(index) if kind == "cuda" else kind
            found.append({"name": str(where), "about": about, "free_bytes": free_memory(where)})
    return found


def _conflicts() -> list[str]:
    """What is installed in versions that were never tried, or that do not go together."""
    from packaging.requirements import Requirement

    found = []
    for text in requires("tokenprune-vlm") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        got = _installed(wanted.name)
        if got is None:
            found.append(f"{wanted.name} is not installed; tokenprune needs {wanted.specifier}")
        elif not wanted.specifier.contains(got, prereleases=True):
            found.append(f"{wanted.name} {got} is installed; tokenprune was tested with {wanted.specifier}")
    if _installed("torchvision") is not None:
        try:
            import torchvision  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
        except (ImportError, RuntimeError, OSError) as error:
            found.append(f"torchvision does not go with torch {_installed('torch')}: {str(error).splitlines()[0]}")
    return found


def _model(name: str) -> dict[str, Any]:
    """Whether the model's family is supported, and what each recipe says of it."""
    import torch
    from transformers import AutoModelForImageTextToText

    from tokenprune.engine.attach import attach
    from tokenprune.families.catalogue import adapter_of
    from tokenprune.families.sketch import sketch_config
    from tokenprune.recipe import list_recipes

    told: dict[str, Any] = {"name": name}
    try:
        config = _embedded() if name == "embedded" else sketch_config(name)
        adapter = adapter_of(config, asker="doctor")
    except UnsupportedModelError as error:
        return told | {"supported": False, "reason": str(error)}
    told |= {
        "supported": True,
        "model_type": adapter.family,
        "family": adapter.title,
        "layers": config.get_text_config().num_hidden_layers,
        "processor": _processor(name),
    }
    with torch.device("meta"):  # no weights: hooks are mounted on the shape alone
        network = AutoModelForImageTextToText.from_config(config)
    refused: dict[str, str] = {}
    for recipe in list_recipes():
        try:
            attach(network, recipe).detach()
        except TokenPruneError as error:
            refused[recipe] = str(error).removeprefix(f"{recipe}: ")
    return told | {"runs": [recipe for recipe in list_recipes() if recipe not in refused], "refused": refused}


def _embedded() -> Any:
    from tokenprune.families.load import quiet
    from tokenprune.scenes import load_embedded

    quiet()
    return load_embedded()[0].config


def _processor(name: str) -> str:
    """The class of the model's processor, or why there is none."""
    from tokenprune.cost.presets import PRESETS
    from tokenprune.families.load import processor_of

    if name == "embedded":
        from tokenprune.scenes import load_embedded

        return type(load_embedded()[1]).__name__
    if name in PRESETS:
        return "not looked at: a published shape has none"
    try:
        return type(processor_of(name)).__name__
    except TokenPruneError as error:
        return str(error)


def _show(facts: dict[str, Any]) -> None:
    screen = console()
    made = table("", "")
    made.show_header = False
    for name, found in facts["versions"].items():
        made.add_row(name, found or "[dim]not installed")
    for name, usable in facts["attention"].items():
        made.add_row(f"attention: {name}", "yes" if usable else "[dim]no")
    for device in facts["devices"]:
        free = device["free_bytes"]
        made.add_row(device["name"], device["about"] + ("" if free is None else f", {free / 2**30:.1f} GiB free"))
    screen.print(made)
    if model := facts.get("model"):
        _show_model(model)
    screen.print()
    for conflict in facts["conflicts"]:
        screen.print(f"[bold red]conflict[/] {conflict}")
    if not facts["conflicts"] and facts.get("model", {}).get("supported", True):
        screen.print("[green]nothing known stands in the way")


def _show_model(model: dict[str, Any]) -> None:
    screen = console()
    screen.print()
    if not model["supported"]:
        screen.print(f"[bold red]not supported[/] {model['reason']}")
        return
    screen.print(f"[bold]{model['name']}[/]: {model['family']} ({model['model_type']}), {model['layers']} layers")
    screen.print(f"processor: {model['processor']}")
    screen.print(f"runs {len(model['runs'])} recipes: {', '.join(model['runs'])}")
    for recipe, reason in model["refused"].items():
        screen.print(f"  [yellow]not {recipe}[/]: {reason}")
