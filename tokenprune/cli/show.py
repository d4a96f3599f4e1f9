"""`tokenprune show`: one recipe, resolved and explained, with its tokens for a model of a given shape."""

from __future__ import annotations

import math
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import (
    AverageOption,
    FinalOption,
    FlopsOption,
    Json,
    KeepOption,
    Plugins,
    RecipeArgument,
    Sets,
    Variant,
    budgets_of,
)
from tokenprune.cli.terminal import console, print_json, progress, table
from tokenprune.core.place import Place, place_name
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from tokenprune.budget import Prices
    from tokenprune.core.grids import Grid
    from tokenprune.pipeline import Pipeline
    from tokenprune.recipe import Recipe

NAME = "show"
EXAMPLES = (
    "  tokenprune show sparsevlm-v1.5 --variant 64",
    "  tokenprune show fastv --keep 0.25 --tokens 1024 --layers 28",
    "  tokenprune show fastv --set stages.0.scorer.rope=false --yaml > mine.yaml",
)


def command(
    recipe: RecipeArgument,
    variant: Variant = None,
    keep: KeepOption = None,
    average: AverageOption = None,
    final: FinalOption = None,
    flops: FlopsOption = None,
    sets: Sets = None,
    plugin: Plugins = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Vision tokens of an image; 576 when left out.", metavar="N")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of the model.", metavar="N")] = 32,
    text: Annotated[int, typer.Option(min=0, help="Other tokens of the prompt; only --flops asks.", metavar="N")] = 64,
    grid: Annotated[
        str | None, typer.Option(help="Rows and columns of the vision tokens; a square if possible.", metavar="HxW")
    ] = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print only the resolved recipe; it loads again.")] = False,
    json_: Json = False,
) -> None:
    """Explain a recipe: its parts and arguments, and the vision tokens that each layer gets.

    Papers mean different things by "64 tokens"; all of them are printed, for a model of the given shape. A budget
    --flops is solved for layers of the size of LLaVA-1.5-7B; `tokenprune flops` solves it for any model.
    """
    budgets = budgets_of(keep, average, final, flops)
    if yaml and json_:
        raise InputError("give only one of --yaml and --json")
    shape = _shape(tokens, grid)
    with progress("reading the recipe"):
        from tokenprune.recipe import load_recipe

        resolved = load_recipe(recipe, variant=variant, sets=sets or (), **budgets)
    if yaml:
        typer.echo(resolved.dump(), nl=False)
        return
    facts = _facts(resolved, shape, layers, text)
    if json_:
        print_json(facts)
    else:
        given: dict[str, Sequence[object] | None] = {
            "--plugin": plugin,
            "--variant": [variant] if variant else None,
            "--set": sets,
        }
        given |= {f"--{kind}": [value] for kind, value in budgets.items() if value is not None}
        more = "".join(f" {option} {quote(str(each))}" for option, values in given.items() for each in values or ())
        _show(resolved, facts, asked=quote(recipe), more=more)


def _shape(tokens: int | None, grid: str | None) -> tuple[int, int, int]:
    """(T, H, W) of the one image that the numbers are for."""
    if grid is None:
        from tokenprune.core.grids import square_or_row

        return square_or_row(576 if tokens is None else tokens)
    return grid_of(tokens, grid)


def grid_of(tokens: int | None, grid: str) -> tuple[int, int, int]:
    """(1, H, W) of ``"HxW"``, which holds so many tokens where that is given.

    Raises:
        InputError: it does not, or is no grid.
    """
    sides = grid.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 10_000 for side in sides):
        raise InputError(f"--grid: expected rows x columns such as 24x24, got {grid!r}")
    height, width = map(int, sides)
    if tokens is not None and height * width != tokens:
        raise InputError(f"--grid {grid} holds {height * width} vision tokens, but --tokens is {tokens}")
    return 1, height, width


def _facts(recipe: Recipe, shape: tuple[int, int, int], layers: int, text: int) -> dict[str, Any]:
    """All numbers, ready for JSON."""
    from tokenprune.budget import nominal_counts, summary, survivors, tokens_per_layer
    from tokenprune.builder import build

    total = math.prod(shape)
    pipeline = build(recipe.first_pass, depth=layers, prices=_prices)
    steps = pipeline.steps(layers)
    planned = pipeline.plan(total, [shape], layers, text=text)
    exact = None not in planned
    counts = (
        tuple(count for count in planned if count is not None)
        if exact
        else nominal_counts(steps, total=total, grids=[shape])
    )
    after = survivors(steps, counts, total)
    numbers = summary(steps, counts, layers, total)
    stages = [
        {**stage, "layer": step.layer, "kept": kept, "merged": size - kept, "tokens": size}
        for stage, step, kept, size in zip(recipe.to_dict()["stages"], steps, counts, after, strict=True)
    ]
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "summary": recipe.summary,
        "paper": recipe.paper,
        "variants": list(recipe.variants),
        "budget": None if recipe.budget is None else {recipe.budget.kind: recipe.budget.value},
        "weights": _weights(recipe),
        "again": None if recipe.again is None else recipe.again.to_dict(),
        "total": total,
        "grid": list(shape),
        "layers": layers,
        "exact": exact,
        "stages": stages,
        "vision_tokens": tokens_per_layer(steps, counts, layers, total),
        "average": numbers.average,
        "average_of_outputs": numbers.average_of_outputs,
        "keep": numbers.keep,
        "final": numbers.final,
    }


def _weights(recipe: Recipe) -> dict[str, str | None]:
    """What each learned part names as its weights, by stage and role; those that do without are left out."""
    from tokenprune.parts.learned import Learned

    named = {
        f"{stage.name}.{role}": part.settings()["weights"]
        for stage in recipe.stages
        for role, part in stage.parts.items()
        if issubclass(part.part, Learned) and not (part.part.plain and part.settings()["weights"] is None)
    }
    if recipe.again is not None and recipe.again.weights is not None:
        named["again"] = recipe.again.weights
    return named


def _prices(pipeline: Pipeline, total: int, grids: Sequence[Grid], text: int, question: int) -> Prices:
    """What a prompt costs on a LLaVA-1.5-7B of the pipeline's depth."""
    from dataclasses import replace

    from tokenprune.cost.presets import PRESETS
    from tokenprune.cost.prices import PromptPrices

    model = PRESETS["llava-1.5-7b"]
    layers = model.decoder.layers if pipeline.depth is None else pipeline.depth
    model = replace(model, decoder=replace(model.decoder, layers=layers))
    return PromptPrices(model, pipeline, total, grids, text, question)


def _show(recipe: Recipe, facts: dict[str, Any], *, asked: str, more: str) -> None:
    from rich.text import Text

    screen = console()
    screen.print(Text.assemble((recipe.name, "bold"), f"  {recipe.summary or ''}"))
    head = table("", "")
    head.show_header = False
    about = {
        "paper": recipe.paper,
        "budget": "none: the schedulers decide" if recipe.budget is None else str(recipe.budget),
        "variants": ", ".join(recipe.variants),
        "fingerprint": recipe.fingerprint,
        "weights": _told_weights(facts["weights"], asked),
        "asks again": "a full picture where the first pass is not sure; the counts below are of the first pass"
        if recipe.again is not None
        else None,
    }
    for key, value in about.items():
        if value:
            head.add_row(f"[dim]{key}", Text(str(value)))
    screen.print(head)
    if recipe.stages:
        stages = recipe.dump().partition("\nstages:\n")[2].partition("\nvariants:\n")[0]
        screen.print(Text.assemble("\n", ("stages", "dim"), f"\n{stages.rstrip()}\n"), soft_wrap=True)
        screen.print(_parts(recipe))
    if recipe.differences:
        screen.print("\n[dim]what differs from the paper")
        made = table("", "")
        made.show_header = False
        for line in recipe.differences:
            made.add_row("  ·", Text(line.strip()))
        screen.print(made)
    screen.print()
    screen.print(_tokens(facts))
    _meanings(facts)
    run = f"tokenprune run --recipe {asked}{more}"
    screen.print(f"[dim]next:[/] {run}; tokenprune show {asked}{more} --yaml", soft_wrap=True)


def _told_weights(weights: dict[str, str | None], asked: str) -> str | None:
    if not weights:
        return None
    missing = [place for place, name in weights.items() if name is None]
    if missing:
        return f"none for {', '.join(missing)}: make them for a model with tokenprune fit {asked} --model MODEL"
    return ", ".join(name for name in weights.values() if name)


def _parts(recipe: Recipe) -> RenderableType:
    """Each part once: every argument, its value (one a stage where they differ), and what it does."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from tokenprune.recipe import describe_part
    from tokenprune.recipe.part_help import yaml_text
    from tokenprune.registry import ROLES

    lines: list[RenderableType] = [Text("parts", "dim")]
    for role in ROLES:
        specs = [stage.parts[role] for stage in recipe.stages if role in stage.parts]
        for kind in dict.fromkeys(spec.type for spec in specs):
            same = [spec for spec in specs if spec.type == kind]
            help_ = describe_part(same[0].part)
            lines.append(Padding(Text.assemble((f"{role} {kind}", "bold"), f"  {help_.summary}"), (0, 0, 0, 2)))
            made = table("", "", "")
            made.show_header = False
            for argument in help_.args:
                values = dict.fromkeys(yaml_text(spec.settings()[argument.name]) for spec in same)
                style = "" if list(values) == [argument.default] else "cyan"  # coloured where it is not the default
                made.add_row(Text(f"    {argument.name}"), Text(", ".join(values), style), Text(argument.help, "dim"))
            lines.append(made)
    return Group(*lines)


def _tokens(facts: dict[str, Any]) -> RenderableType:
    about = "" if facts["exact"] else "≈"
    made = table("stage", "place", ">kept", ">merged", ">tokens after it", ">share")
    made.add_row("[dim]input", "", "", "", str(facts["total"]), "100%")
    for number, stage in enumerate(facts["stages"]):
        place = Place.parse(stage["place"])
        made.add_row(
            str(stage.get("name") or number),
            place_name(str(place), stage["layer"] if place.in_decoder else None),
            f"{about}{stage['kept']}",
            f"{about}{stage['merged']}",
            f"{about}{stage['tokens']}",
            f"{stage['tokens'] / facts['total']:.1%}",
        )
    return made


def _meanings(facts: dict[str, Any]) -> None:
    """The token number of the recipe in every meaning that papers give to it."""
    screen = console()
    total, about = facts["total"], "" if facts["exact"] else "≈"
    _, height, width = facts["grid"]
    screen.print(f"\nVision tokens for {facts['layers']} layers and {total} vision tokens ({height} × {width}):")
    made = table("", "", "", "")
    made.show_header = False
    for name, value, what in (
        ("average", facts["average"], "entering a layer, mean over all layers: the true cost"),
        ("keep", facts["keep"], "entering a layer, mean from the first place on"),
        ("final", facts["final"], "left after the last stage"),
        ("", facts["average_of_outputs"], "leaving a layer, mean over all layers: how SparseVLM's code counts"),
    ):
        made.add_row(f"  [bold]{name}", f"{about}{value:.4g}", f"{value / total:.1%}", f"[dim]{what}")
    screen.print(made)
    if any(stage.get("dropped") == "skip_ffn" for stage in facts["stages"]):
        screen.print(
            "dropped: skip_ffn: these are the tokens that go through feed-forwards and stay in the caches; attention "
            "sees the others, too, and `tokenprune flops` counts that"
        )
    if not facts["exact"]:
        screen.print("≈: the picture and the question decide; --keep, --average, --final or --flops fix the counts")
