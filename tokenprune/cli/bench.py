"""`tokenprune bench`: is it faster here, by how much, and how near to what its multiply-adds allow?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import (
    AttentionOption,
    AverageOption,
    DeviceOption,
    DtypeOption,
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
from tokenprune.cli.terminal import check_plot, counter, print_json, progress
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.families.load import Kernel
    from tokenprune.recipe import Recipe

NAME = "bench"
EXAMPLES = (
    "  tokenprune bench fastv --keep 0.33",
    "  tokenprune bench sparsevlm-v1.5 --variant 192 --model llava-1.5-7b \\",
    "                   --layers 12 --width 1024 --batch 1",
    "  tokenprune bench feather --keep 0.25 --model qwen2.5-vl-7b --tokens 2880 \\",
    "                   --device cuda --dtype bfloat16 --save-plot times.png",
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
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="'embedded'; a published shape with random weights (llava-1.5-7b, llava-1.5-13b, qwen2.5-vl-7b); a "
            "folder or a hub id.",
            metavar="NAME",
        ),
    ] = "embedded",
    layers: Annotated[
        int | None, typer.Option(min=1, help="So many decoder layers, with random weights.", metavar="N")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Hidden states of so many numbers, with random weights.", metavar="N")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Vision tokens; one usual picture when left out.", metavar="N")
    ] = None,
    text: Annotated[int, typer.Option(min=1, help="Other tokens of the prompt.", metavar="N")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate; 1 times the prefill.", metavar="N")] = 16,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size, 1 and 8 when left out. Repeatable.", metavar="N")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each side, an odd number.", metavar="N")] = 7,
    baselines: Annotated[bool, typer.Option(help="Run random, uniform and a smaller image beside.")] = True,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run all sides under torch.compile: at first minutes for each.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = "sdpa",
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG with a bar for each side.", metavar="FILE")
    ] = None,
    json_: Json = False,
) -> None:
    """Time a recipe against the untouched model, random and uniform choice, and a smaller image at equal tokens.

    All sides share weights, attention kernel and process, and take turns. A speed-up is the median over rounds, with a
    95 % interval; beside it stand what the multiply-adds allow (the ceiling) and the share of it that was reached.

    Random weights run as fast as trained ones: a published shape needs no download. --layers and --width scale it to
    the machine.
    """
    budgets = budgets_of(keep, average, final, flops)
    if rounds % 2 == 0:
        raise InputError(f"--rounds: expected an odd number, so that a median is a measured one, got {rounds}")
    check_plot(save_plot)
    with progress("reading the recipe"):
        from tokenprune.recipe import load_recipe

        resolved = load_recipe(recipe, variant=variant, sets=sets or (), **budgets)
    with progress(f"making {model}"):
        network = _network(model, layers, width, dtype, device, attention)
    batches = list(dict.fromkeys(batch or (1, 8)))
    doing = "compiling, minutes at first, then timing" if compile_ else "timing"
    with counter(doing, _runs(resolved, batches, rounds, baselines)) as on_run:
        from tokenprune.study.bench import bench

        result = bench(
            network,
            resolved,
            name=_called(model, layers, width),
            tokens=tokens,
            text=text,
            new_tokens=new_tokens,
            batches=batches,
            rounds=rounds,
            baselines=baselines,
            compile=compile_,
            on_run=on_run,
        )

    from tokenprune.cli.answer import versions
    from tokenprune.cli.bench_table import show

    if save_plot is not None:
        with progress("drawing"):
            from tokenprune.plot.style import save
            from tokenprune.plot.times import plot_times

            save(plot_times(result), save_plot)
    if json_:
        plot = None if save_plot is None else str(save_plot)
        print_json({**result.to_dict(), "plot": plot, "versions": versions()})
    else:
        show(result)


def _network(
    model: str, layers: int | None, width: int | None, dtype: str | None, device: str | None, attention: Kernel
) -> Any:
    """The model: random weights of a published shape, or where --layers or --width change it; else its own."""
    import torch

    from tokenprune.cost.presets import PRESETS
    from tokenprune.families.load import device_named, dtype_named, quiet

    scaled = layers is not None or width is not None
    if model not in PRESETS and not scaled:
        from tokenprune.answers import load

        return load(model, dtype=dtype, device=device, attention=attention).model
    if model == "embedded":
        raise InputError("--layers and --width give random weights; the embedded model is tiny and has its own")
    from tokenprune.families.sketch import sketch_config, sketch_model

    where = device_named(device)
    kind = dtype_named(dtype) or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    quiet()
    config = sketch_config(model, layers=layers, width=width)
    return sketch_model(config, dtype=kind, device=where, attention=attention)


def _called(model: str, layers: int | None, width: int | None) -> str:
    changes = [f"{value} {what}" for value, what in ((layers, "layers"), (width, "wide")) if value is not None]
    return f"{model} ({', '.join(changes)})" if changes else model


def _runs(recipe: Recipe, batches: list[int], rounds: int, baselines: bool) -> int:
    """Runs that the progress bar counts: rounds and one warm-up, of every side."""
    from tokenprune.study.bench.sides import BASELINES

    others = sum(name != recipe.name for name in BASELINES) + 1
    return len(batches) * (rounds + 1) * (2 + baselines * others)
