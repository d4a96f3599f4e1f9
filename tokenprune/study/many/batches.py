"""`Line`: one question of a long list; and how the list is put into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """One question about one picture. Plain data: it travels to other processes."""

    path: Path
    image: str
    """The picture as the user named it; so it stands in the results."""
    digest: str
    """Of the picture's file: results are found again by what was seen, not by a name."""
    size: tuple[int, int]
    """Width and height in pixels."""
    question: str
    given: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the user's line says; it is handed on."""

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits for picture and question."""
        return sha256("\0".join((self.image, self.digest, self.question)).encode()).hexdigest()[:16]


Batch = tuple[Sequence[Line], bool]
"""Questions, and whether they are also asked with all vision tokens."""


def digest(picture: Path) -> str:
    """Sixteen hexadecimal digits for a picture's file."""
    return sha256(picture.read_bytes()).hexdigest()[:16]


def in_batches(lines: Sequence[Line], size: int) -> list[list[int]]:
    """Indices of `lines` in batches of at most `size`: pictures of one size together, questions of similar length.

    The batches depend on nothing else, so that every process, and every later run, makes the same ones.
    """
    order = sorted(range(len(lines)), key=lambda i: (lines[i].size, len(lines[i].question.split()), i))
    return [order[start : start + size] for start in range(0, len(order), size)]
