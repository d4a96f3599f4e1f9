"""What `run` says where the embedded model is shown a picture that is no scene of coloured shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SHOWN = ("colour", "shape", "existence", "counting", "localisation")
"""Tasks of which a question is shown."""


def strange_pictures(model: str, paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> str:
    """One line about pictures that mean nothing to the embedded model; empty without any, and for other models.

    Pixels do not tell whether a picture is a scene: a shipped sample, or a picture of exactly their size, is taken for
    one.

    Args:
        model: its name, as the user gave it.
        paths: of the pictures.
        sizes: their widths and heights.
    """
    from tokenprune.families.load import EMBEDDED
    from tokenprune.scenes import samples
    from tokenprune.scenes.make_samples import SIDE

    strange = [path for path, size in zip(paths, sizes, strict=True) if size != (SIDE, SIDE)]
    if model != EMBEDDED or not strange:
        return ""
    first = {sample.task: sample.question for sample in samples()}
    asked = "; ".join(first[task].replace(" ?", "?").replace(" .", "") for task in SHOWN)
    which = f"{strange[0]} shows none" if len(strange) == 1 else f"{len(strange)} of these pictures show none"
    return (
        f"the embedded model knows coloured shapes only, and {which}, so its answers mean nothing; it understands: "
        f"{asked}; for photographs give --model"
    )
