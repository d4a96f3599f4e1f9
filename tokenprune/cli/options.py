"""Options that several commands share: one definition, one help text, one check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tokenprune.errors import BudgetError, InputError


def _try_parts(context: typer.Context, files: list[Path] | None) -> list[Path] | None:
    """Let recipes name the parts of these files until the command ends."""
    if files:
        from tokenprune.registry import trying

        context.with_resource(trying(files))
    return files


RecipeArgument = Annotated[str, typer.Argument(help="Recipe by name (see `tokenprune ls`) or by path.")]
Variant = Annotated[
    str | None, typer.Option(help="Published setting of the recipe (see `tokenprune show`).", metavar="NAME")
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        help="Budget: vision tokens from the recipe's first place on, a count such as 64 or a share such as 0.33. "
        "1.0 keeps all, 1 keeps one.",
        metavar="N|SHARE",
    ),
]
AverageOption = Annotated[
    str | None, typer.Option(help="The same budget, as an average over all layers.", metavar="N|SHARE")
]
FinalOption = Annotated[
    str | None, typer.Option(help="The same budget, as what is left after the last stage.", metavar="N|SHARE")
]
FlopsOption = Annotated[
    str | None,
    typer.Option(
        "--flops", help="Budget: multiply-adds of the prefill, as a share of the untouched model's.", metavar="SHARE"
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a key of the recipe first (stages.0.scorer); `tokenprune show` prints them. Repeatable.",
        metavar="PATH=VALUE",
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        callback=_try_parts,
        help="Python file with parts of your own, which recipes may name in this run. It is executed. Repeatable.",
        metavar="FILE.py",
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", metavar="N")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="'embedded', a folder, or a hub id.", metavar="NAME")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Of the weights: float32, bfloat16 or float16. Left out: float32 on a CPU, else the checkpoint's own.",
        metavar="TYPE",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; a GPU if there is one when left out.", metavar="NAME")
]
AttentionOption = Annotated[Literal["sdpa", "eager"], typer.Option(help="Implementation of attention.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def budgets_of(
    keep: str | None, average: str | None, final: str | None, flops: str | None = None
) -> dict[str, int | float | None]:
    """The budget options as numbers, for `load_recipe`.

    Raises:
        InputError: not a number, or more than one of them.
    """
    budgets = {
        "keep": amount(keep, "--keep"),
        "average": amount(average, "--average"),
        "final": amount(final, "--final"),
        "flops": share(flops, "--flops"),
    }
    if sum(value is not None for value in budgets.values()) > 1:
        raise InputError(
            "give only one of --keep, --average, --final and --flops: each sets the budget of the whole recipe"
        )
    return budgets


def amount(text: str | None, option: str) -> int | float | None:
    """``"64"`` is a count, ``"0.33"`` and ``"33%"`` are shares.

    Raises:
        BudgetError: anything else, or out of range.
    """
    if text is None:
        return None
    from tokenprune.budget import count_of

    clean = text.strip()
    try:
        if clean.endswith("%"):
            value: int | float = float(clean[:-1]) / 100
        elif clean.lstrip("+-").isascii() and clean.lstrip("+-").isdigit():
            value = int(clean)
        else:
            value = float(clean)
    except ValueError:
        raise BudgetError(f"{option}: expected a count such as 64 or a share such as 0.33, got {text!r}") from None
    try:
        count_of(value, 1)
    except BudgetError as error:
        raise BudgetError(f"{option}: {error}") from None
    return value


def share(text: str | None, option: str) -> float | None:
    """``"0.35"`` and ``"35%"`` are shares, ``"1"`` is all.

    Raises:
        BudgetError: anything else, or out of range.
    """
    if text is None:
        return None
    clean = text.strip()
    try:
        value = float(clean[:-1]) / 100 if clean.endswith("%") else float(clean)
    except ValueError:
        raise BudgetError(f"{option}: expected a share in (0, 1] such as 0.35, got {text!r}") from None
    if not 0.0 < value <= 1.0:
        raise BudgetError(f"{option}: expected a share in (0, 1] such as 0.35, got {text!r}")
    return value
