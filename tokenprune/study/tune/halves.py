"""`halves`: cases in two parts that share no picture, one to choose on and one to report on."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from tokenprune.errors import InputError
from tokenprune.study.cases import Case


def halves(cases: Sequence[Case], seed: int = 0) -> tuple[list[Case], list[Case]]:
    """The cases about one half of the pictures, drawn by `seed`, and those about the other.

    Pictures are told apart by their pixels: one that has two names is one picture. Of an odd number the first half has
    one more.

    Raises:
        InputError: fewer than two pictures.
    """
    of: dict[str, str] = {}
    for case in cases:
        if case.picture_id not in of:
            of[case.picture_id] = _pixels(case)
    drawn = sorted(set(of.values()), key=lambda pixels: sha256(f"{seed} {pixels}".encode()).digest())
    if len(drawn) < 2:
        raise InputError(
            f"tune: needs two pictures or more, to choose on some and to report on others; got {len(drawn)}"
        )
    first = set(drawn[: (len(drawn) + 1) // 2])
    return (
        [case for case in cases if of[case.picture_id] in first],
        [case for case in cases if of[case.picture_id] not in first],
    )


def _pixels(case: Case) -> str:
    picture = case.picture().convert("RGB")
    return sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
