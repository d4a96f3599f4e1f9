"""The grids of a prompt's pictures, from what the host has seen of the prompt; or why they are not known."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from tokenprune.core.grids import Grid, UnknownGrid
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.adapter import VisionRow
from tokenprune.families.anatomy import Anatomy


def grids_of(
    anatomy: Anatomy,
    *,
    vision: np.ndarray,
    video: np.ndarray,
    real: np.ndarray,
    positions: np.ndarray,
    newline: np.ndarray | None,
    pixels: tuple[int, int] | None,
    sizes: np.ndarray | None,
) -> tuple[tuple[tuple[Grid, ...], ...], tuple[str | None, ...]]:
    """Grids of the pictures of each sample, and for each why they are not known; None where they are.

    Args:
        anatomy: its adapter reads them.
        vision: ``[B, L]`` bool, placeholders of vision tokens, those that the attention mask hides included.
        video: ``[B, L]`` bool, those of them that stand for a video.
        real: ``[B, L]`` bool, False where the attention mask hides a token.
        positions: ``[1 or 3, B, L]`` position ids.
        newline: ``[B, L]`` bool, row separators; None where the family has none.
        pixels: height and width of each picture, where the model was given pictures of one size.
        sizes: ``[pictures, 2 or 3]`` of all samples, as `Adapter.sizes` names them; None where it was not given.
    """
    seen, placed = vision & real, vision.sum(1).tolist()
    pictures = _by_sample(anatomy, sizes, placed)
    found: list[tuple[tuple[Grid, ...], str | None]] = []
    for row, own in enumerate(seen):
        n = int(own.sum())
        if n < placed[row]:
            cause = f"the attention mask hides {placed[row] - n} of {placed[row]} vision tokens"
            found.append((_stand_in(n), cause if n else None))
            continue
        starts = _starts(own, video[row])
        info = VisionRow(
            runs=tuple(np.diff([*starts, n]).tolist()),
            positions=positions[:, row, own] if len(positions) == 3 else None,
            newline=None if newline is None else tuple(newline[row, own].tolist()),
            pixels=pixels,
            pictures=pictures[row],
            videos=tuple(video[row, own][starts].tolist()),
        )
        try:
            grids = _checked(anatomy, anatomy.adapter.grids(anatomy.base, info), n) if n else ()
            found.append((grids, None))
        except InputError as error:
            found.append((_stand_in(n), str(error)))
    told, causes = zip(*found, strict=True)
    return told, causes


def _checked(anatomy: Anatomy, grids: Sequence[Grid], n: int) -> tuple[Grid, ...]:
    """What an adapter says of `n` vision tokens; an adapter that miscounts would misplace every token behind."""
    found = sum(map(prod, grids))
    if found != n or any(len(grid) != 3 for grid in grids):
        raise UnsupportedModelError(
            f"{type(anatomy.adapter).__name__}.grids told {list(grids)}, which is {found} vision tokens, of {n}; "
            "expected (frames, rows, columns) of each picture, which sum to them, or an InputError with the cause"
        )
    return tuple(grids)


def _stand_in(n: int) -> tuple[Grid, ...]:
    return (UnknownGrid(1, 1, n),) if n else ()


def _starts(own: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Where the uninterrupted runs of one kind begin, counted in the True of `own` ``[L]``."""
    at = np.flatnonzero(own)
    breaks = (np.diff(at) > 1) | (np.diff(video[at].astype(np.int8)) != 0)
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(at)), dtype=bool), breaks]))


def _by_sample(
    anatomy: Anatomy, sizes: np.ndarray | None, placed: Sequence[int]
) -> list[tuple[tuple[int, ...], ...] | None]:
    """The pictures of each sample, out of those of the whole batch: in order, as many as fill its placeholders.

    `generate` may have repeated each sample (beams, several answers) since it was given the sizes. Where they do not
    fill the placeholders, nothing is said.
    """
    unknown: list[tuple[tuple[int, ...], ...] | None] = [None] * len(placed)
    if sizes is None:
        return unknown
    pictures: list[tuple[int, ...]] = [tuple(size) for size in sizes.tolist()]
    tokens = [anatomy.adapter.picture_tokens(anatomy.base, size) for size in pictures]
    repeats = sum(placed) // max(1, sum(tokens))
    if not repeats or len(placed) % repeats:
        return unknown
    found: list[tuple[tuple[int, ...], ...] | None] = []
    at = 0
    for row in range(0, len(placed), repeats):
        end, left = at, placed[row]
        while left > 0 and end < len(pictures):
            left, end = left - tokens[end], end + 1
        if left or len(set(placed[row : row + repeats])) > 1:
            return unknown
        found += [tuple(pictures[at:end])] * repeats
        at = end
    return found if at == len(pictures) else unknown
