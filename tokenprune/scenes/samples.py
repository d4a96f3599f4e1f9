"""Sample pictures that are shipped with the package, for demonstrations and documentation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenprune.scenes.embedded import ASSETS

FOLDER = ASSETS / "samples"


@dataclass(frozen=True)
class Sample:
    """A shipped picture with one question; `box` is the target's (left, top, right, bottom) as shares of the side."""

    path: Path
    question: str
    answer: str
    task: str
    ground: str
    difficulty: str
    box: tuple[float, float, float, float] | None


def samples() -> list[Sample]:
    """All sample pictures, the one for demonstrations first; every task occurs."""
    entries = json.loads((FOLDER / "samples.json").read_text(encoding="utf-8"))
    return [
        Sample(
            path=FOLDER / entry["file"],
            question=entry["question"],
            answer=entry["answer"],
            task=entry["task"],
            ground=entry["ground"],
            difficulty=entry["difficulty"],
            box=tuple(entry["box"]) if entry["box"] else None,
        )
        for entry in entries
    ]
