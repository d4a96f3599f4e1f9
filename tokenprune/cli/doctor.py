"""`tokenprune doctor`: what this machine has, what may go wrong with it, and what a model can run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tokenprune import __version__
from tokenprune.cli.options import Json
from tokenprune.cli.terminal import console, note, print_json, progress, table
from tokenprune.errors import TokenPruneError, UnsupportedModelError

NAME = "doctor"
EXAMPLES = (
    "  tokenprune doctor",
    "  tokenprune doctor my-llava/",
    "  tokenprune doctor --json            to paste into a bug report",
)


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="'embedded', a published shape, a folder or a hub id; weights are not read.", metavar="[MODEL]"
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Tell versions, attention kernels and devices, known conflicts, and which recipes a model can run.

    Paste its output into a bug report. Ends with status 1 if something that it found stands in the way.
    """
    with progress("looking around"):
        from tokenprune.core.machine import torchvision_conflict
        from tokenprune.engine.doctor import machine

        facts = machine()
        facts["versions"] = {"tokenprune": __version__, **facts["versions"]}
    if model is not None and torchvision_conflict() is not None:
        note(f"{model} is not looked at: transformers cannot be imported beside this torchvision")
    elif model is not None:
        with progress(f"trying every recipe on the shape of {model}"):
            facts["model"] = _model(model)
    if json_:
        print_json(facts)
    else:
        _show(facts)
    if facts["conflicts"] or not facts.get("model", {}).get("supported", True):
        raise typer.Exit(1)


def _model(name: str) -> dict[str, Any]:
    """Whether the model's family is supported, and what each recipe says of it."""
    from tokenprune.engine.doctor import runs
    from tokenprune.families.sketch import sketch_config

    try:
        config = sketch_config(name)
        return {"name": name, "supported": True, **runs(config), "processor": _processor(name)}
    except UnsupportedModelError as error:
        return {"name": name, "supported": False, "reason": str(error)}


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
