"""`tokenprune flops`: what a recipe saves and costs on a model, counted from the model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from tokenprune.cli.terminal import check_plot, complain, console, print_json, progress, table
from tokenprune.cli.verdicts import counted
from tokenprune.cli.verify_table import show_verification
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.core.grids import Grid
    from tokenprune.cost.account import Cost, Ledger
    from tokenprune.cost.shape import ModelShape
    from tokenprune.recipe import Recipe
    from tokenprune.study.verify import Verification

NAME = "flops"
EXAMPLES = (
    "  tokenprune flops sparsevlm-v1.5 --variant 64 --text 118",
    "  tokenprune flops fastv --keep 0.25 --model qwen2.5-vl-7b --grid 48x64",
    "  tokenprune flops pyramiddrop --flops 0.5 --text 118",
    "  tokenprune flops feather --model llava-next-7b --new-tokens 128 \\",
    "                   --save-plot layers.png",
    "  tokenprune flops fastv --keep 0.25 --verify",
)


def command(
    recipe: RecipeArgument,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-mistral-7b, qwen2.5-vl-7b; or 'embedded', "
            "a folder, or a hub id, of which only config.json is read.",
            metavar="NAME",
        ),
    ] = "llava-1.5-7b",
    variant: Variant = None,
    keep: KeepOption = None,
    average: AverageOption = None,
    final: FinalOption = None,
    flops: FlopsOption = None,
    sets: Sets = None,
    plugin: Plugins = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Vision tokens; one usual picture when left out.", metavar="N")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Rows and columns of the vision tokens.", metavar="HxW")] = None,
    text: Annotated[int, typer.Option(min=0, help="Other tokens of the prompt.", metavar="N")] = 64,
    question: Annotated[
        int | None,
        typer.Option(min=0, help="Of these, the ones behind the image, which may rate; all if left out.", metavar="N"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer, in tokens.", metavar="N")] = 32,
    kv_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a number in the KV cache.", metavar="N")] = 2,
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG with a bar for each layer.", metavar="FILE.png")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run a small model of this shape, and let fvcore and PyTorch count.")
    ] = False,
    json_: Json = False,
) -> None:
    """Count what a recipe saves and what it costs itself, in multiply-adds, without any weights.

    Papers count differently: vision tokens alone, or the whole prompt, or all from the pixels to the answer. All three
    are printed.
    """
    budgets = budgets_of(keep, average, final, flops)
    if question is not None and question > text:
        raise InputError(f"--question {question} is part of --text {text}, so it cannot be longer")
    check_plot(save_plot)
    with progress("reading the recipe"):
        from tokenprune.recipe import load_recipe

        resolved = load_recipe(recipe, variant=variant, sets=sets or (), **budgets)
    with progress(f"reading the configuration of {model}"):
        from tokenprune.families.ledger import shape_of

        shape = shape_of(model)
        grids = _grids(shape, tokens, grid)
    from tokenprune.families.ledger import ledger

    told = ledger(shape, resolved, grids=grids, text=text, question=question, new_tokens=new_tokens, kv_bytes=kv_bytes)
    verified = None
    if verify:
        with progress(f"counting on a small {model}"):
            verified = _verify(model, resolved, grids, text, question)
    if save_plot is not None:
        from tokenprune.plot.layers import plot_layers
        from tokenprune.plot.style import save

        save(plot_layers(told), save_plot)
    if json_:
        plot = None if save_plot is None else str(save_plot)
        more = {"fingerprint": resolved.fingerprint, "grids": list(map(list, grids)), "plot": plot}
        print_json({**told.to_dict(), **more, **({} if verified is None else {"verify": verified.to_dict()})})
    else:
        _show(told, resolved)
        if verified is not None:
            show_verification(verified)
    if verified is not None and not verified.agrees:
        complain("the counters differ from the ledger; is a part's multiply_adds wrong?")
        raise typer.Exit(1)


def _verify(model: str, recipe: Recipe, grids: Sequence[Grid] | None, text: int, question: int | None) -> Verification:
    """Counters on a small model of the shape of `model`."""
    from tokenprune.study.verify import verify

    return replace(verify(model, recipe, grids=grids, text=text, question=question), model=model)


def _grids(shape: ModelShape, tokens: int | None, grid: str | None) -> tuple[Grid, ...]:
    from tokenprune.cli.show import grid_of
    from tokenprune.families.ledger import picture

    return picture(shape, tokens) if grid is None else (grid_of(tokens, grid),)


def _show(told: Ledger, recipe: Recipe) -> None:
    from rich.text import Text

    from tokenprune.cost.account import VIEWS, readable

    screen = console()
    about = "" if told.exact else "≈"
    budget = "" if recipe.budget is None else f", {recipe.budget}"
    tokens = f"{told.total} vision and {told.text} other tokens, answer of {told.new_tokens}"
    screen.print(Text.assemble((told.recipe, "bold"), budget, " on ", (told.model, "bold"), f": {tokens}"))
    made = table("multiply-adds", ">untouched", ">reduced", ">share", "")

    def add(name: str, key: str, note: str, style: str = "") -> None:
        before, after = getattr(told.untouched, key), getattr(told.reduced, key)
        share = f"{after / before:.1%}" if before else ""
        sure = "" if before == after else about
        numbers = (readable(before), f"{sure}{readable(after)}", f"{sure}{share}" if share else "")
        made.add_row(Text(name, style), *numbers, Text(note, "dim"))

    for key, name, note in PIECES:
        add(f"  {name}", key, note)
    for key, note in zip(VIEWS, ("as papers count", "decoder layers and the recipe itself", "all of it"), strict=True):
        add(VIEWS[key], key, note, "bold")
    add("prefill", "prefill", "up to the first token: --flops is a share of it", "bold")
    screen.print(made)
    screen.print()
    screen.print(_stages(told, about))
    _cache(told.untouched, told.reduced, about)
    if told.reduced.unstated:
        names = ", ".join(told.reduced.unstated)
        screen.print(f"Not stated, and in no number above: what {names} costs (Part.multiply_adds)")
    if not told.exact:
        fix = "--keep, --average, --final or --flops fix the counts"
        screen.print(f"[dim]≈: the picture and the question decide; {fix}")
    screen.print("[dim]A multiply-add is one; some counters say two operations. Attention counts all pairs.")
    screen.print(f"[bold]{counted(told)}")


PIECES = (
    ("vision_tower", "vision tower", ""),
    ("projector", "projector", ""),
    ("decoder", "decoder layers", "the whole prompt"),
    ("method", "the recipe itself", "raters, scores, clusters"),
    ("lm_head", "lm_head", "one token"),
    ("decode", "decoding", "the tokens after the first"),
)


def _stages(told: Ledger, about: str) -> Table:
    from tokenprune.cost.account import readable

    made = table("stage", "place", ">tokens after it", ">own cost", "of which")
    for stage in told.reduced.stages:
        place = f"before layer {stage.layer}" if stage.layer else "before all layers"
        parts = "\n".join(  # a line each: wrapped, a number would part from its unit
            [f"{role} {readable(cost)}" for role, cost in stage.parts.items()]
            + [f"{part} not stated" for part in stage.unstated]
        )
        made.add_row(stage.name, place, f"{about}{stage.tokens}", f"{about}{readable(stage.total)}", parts)
    return made


def _cache(untouched: Cost, reduced: Cost, about: str) -> None:
    mebi = 2**20
    console().print(
        f"\nKV cache behind the prefill: {untouched.kv_bytes / mebi:.4g} → {about}{reduced.kv_bytes / mebi:.4g} MiB "
        f"({about}{reduced.kv_bytes / untouched.kv_bytes:.1%})"
    )
