"""`Case`: a question about a picture and the answers that count as right; what `evaluate` and `audit` ask."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a target, as shares of the picture's sides (0 to 1)."""


def normal(text: str) -> str:
    """`text` in lower case, with single spaces and without quotes or a full stop at its ends."""
    return re.sub(r"\s+", " ", text.lower()).strip(" .,;:!?'\"")


def same_words(given: str, answer: str) -> bool:
    """Whether `given` is `answer`, both as `normal` has them."""
    return normal(given) == normal(answer)


@dataclass(frozen=True)
class Case:
    """One question about one picture.

    `picture` opens it, `picture_id` says which it is: cases with one id share a picture, and statistics keep them
    together. The id must change when the picture does, because results on disk are found by it.
    """

    picture: Callable[[], Image]
    picture_id: str
    question: str
    answer: str
    task: str = "all"
    difficulty: str = ""
    """What makes it easy or hard, in a word; accuracy is also given for each. Empty where nothing is known."""
    accepts: Callable[[str, str], bool] = same_words
    """(given, answer) to whether `given` counts as right."""
    target: Box | None = None
    """Where the thing asked for is; None where no single thing is asked for, or nobody knows."""
    rank: int = 0
    """Place of its task in tables, lowest first; tasks of equal rank stand in the order of their first questions."""
    where: str = ""
    """Where it is written, as ``FILE:LINE``, for messages about it; empty where it is in no file."""

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits for picture and question."""
        return sha256("\0".join((self.picture_id, self.question)).encode()).hexdigest()[:12]

    def right(self, given: str) -> bool:
        """Whether `given` counts as the answer."""
        return self.accepts(given, self.answer)
