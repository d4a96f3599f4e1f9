"""The table of `tokenprune flops --verify`: ledger and counters side by side."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from tokenprune.cli.terminal import console, table

if TYPE_CHECKING:
    from tokenprune.study.verify import Piece, Verification


def show_verification(told: Verification) -> None:
    """Print it: neighbouring layers with the same numbers are one line."""
    from rich.text import Text

    from tokenprune.cost.account import readable

    screen = console()
    screen.print()
    narrow = "" if told.width == told.full_width else f", {told.width} wide instead of {told.full_width}"
    screen.print(Text.assemble("Counted on ", (told.model, "bold"), f" with random weights{narrow}"))
    made = table("multiply-adds", ">ledger", ">fvcore", ">torch", ">torch, SDPA", "")
    for _, group in groupby(told.pieces, key=lambda piece: (piece.name.split()[0] == "layer", _numbers(piece))):
        pieces = list(group)
        name = pieces[0].name
        if len(pieces) > 1:
            name = f"layers {name.split()[1]} to {pieces[-1].name.split()[1]}, each"
        numbers = ["" if number is None else readable(number) for number in _numbers(pieces[0])]
        wrong = "" if all(piece.agrees for piece in pieces) else "they differ"
        made.add_row(Text(name), *numbers, Text(wrong, "bold red"))
    screen.print(made)
    for note in told.notes:
        screen.print(Text(f"{note}.", "dim"))


def _numbers(piece: Piece) -> tuple[int | None, ...]:
    return piece.ledger, piece.fvcore, piece.torch, piece.torch_sdpa
