"""What is asked: pictures, questions and the answers that count as right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from typing import TYPE_CHECKING

from tokenprune.errors import InputError, did_you_mean
from tokenprune.scenes import TASKS, make_scene
from tokenprune.scenes.world.questions import is_right

if TYPE_CHECKING:
    from PIL.Image import Image


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

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits for picture and question."""
        return sha256("\0".join((self.picture_id, self.question)).encode()).hexdigest()[:12]

    def right(self, given: str) -> bool:
        """Whether `given` counts as the answer."""
        return self.accepts(given, self.answer)


def scene_cases(scenes: int, *, tasks: Sequence[str] = TASKS, first: int = 0) -> list[Case]:
    """The questions about `scenes` held-out scenes, from number `first` on: the same ones for the same numbers.

    Raises:
        InputError: fewer than one scene, or an unknown task.
    """
    if scenes < 1:
        raise InputError(f"scenes: expected at least 1, got {scenes}")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task: expected one of {', '.join(TASKS)}, got {task!r}{did_you_mean(task, TASKS)}")
    return [case for number in range(first, first + scenes) for case in _of_scene(number, tasks)]


def _of_scene(number: int, tasks: Iterable[str]) -> list[Case]:
    scene = make_scene(number)
    picture_id = f"scene {number} {sha256(scene.image.tobytes()).hexdigest()[:12]}"

    @cache
    def picture() -> Image:
        from PIL import Image

        return Image.fromarray(scene.image)

    wanted = set(tasks)
    return [
        Case(picture, picture_id, q.question, q.answer, q.task, q.difficulty, partial(is_right, q.task))
        for q in scene.questions
        if q.task in wanted
    ]
