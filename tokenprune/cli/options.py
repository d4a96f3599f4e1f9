"""Options that several commands share: one definition, one help text, one check."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenprune.cli.terminal import amount, share
from tokenprune.errors import InputError

Variant = Annotated[str | None, typer.Option(help="Published setting of the recipe.", metavar="NAME")]
KeepOption = Annotated[
    str | None, typer.Option(help="Budget: average from the recipe's first place on.", metavar="N|SHARE")
]
AverageOption = Annotated[str | None, typer.Option(help="Budget: average over all layers.", metavar="N|SHARE")]
FinalOption = Annotated[str | None, typer.Option(help="Budget: after the last stage.", metavar="N|SHARE")]
FlopsOption = Annotated[
    str | None,
    typer.Option(
        "--flops", help="Budget: multiply-adds of the prefill, as a share of the untouched model's.", metavar="SHARE"
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Change the recipe first. Repeatable.", metavar="PATH=VALUE")
]
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
