"""Held-out scenes as cases: what `evaluate` and `audit` ask about generated pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING

from tokenprune.errors import InputError, did_you_mean
from tokenprune.scenes import TASKS, TRAIN_SEEDS, Question, Scene, make_scene
from tokenprune.scenes.world import generate
from tokenprune.scenes.world.generate import UNITS
from tokenprune.scenes.world.questions import is_right, questions
from tokenprune.study.cases import Box, Case

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


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


def training_cases(scenes: int, *, tasks: Sequence[str] = TASKS, first: int = 0) -> list[Case]:
    """The questions about scenes of a training stream, none of them held out: what `fit` learns from."""
    numbers = range(first, first + scenes)
    return [case for number in numbers for case in _cases(f"training scene {number}", _training(number), tasks)]


def localisation_cases() -> Iterator[Case]:
    """Questions that ask where something is, without end: one of each held-out scene that has one, in order."""
    return (case for number in count() for case in _of_scene(number, ("localisation",)))


def _of_scene(number: int, tasks: Iterable[str]) -> list[Case]:
    return _cases(f"scene {number}", make_scene(number), tasks)


def _training(number: int) -> Scene:
    """A scene of a stream that the embedded model's own training did not read, and no test does."""
    made = generate.scene(TRAIN_SEEDS[-1], number)
    return Scene(made.image, made.ground, made.objects, tuple(questions(made)))


def _cases(name: str, scene: Scene, tasks: Iterable[str]) -> list[Case]:
    picture_id = f"{name} {sha256(scene.image.tobytes()).hexdigest()[:12]}"

    picture = partial(_picture, scene.image)
    wanted = set(tasks)
    return [
        Case(
            picture,
            picture_id,
            question.question,
            question.answer,
            question.task,
            question.difficulty,
            partial(is_right, question.task),
            _target(question),
            TASKS.index(question.task),
        )
        for question in scene.questions
        if question.task in wanted
    ]


def _picture(pixels: NDArray[np.uint8]) -> Image:
    """Of the module, with the pixels as its argument: cases travel to other processes."""
    from PIL import Image

    return Image.fromarray(pixels)


def _target(question: Question) -> Box | None:
    """The box of the thing asked for, from scene units to shares of the picture."""
    if question.box is None:
        return None
    left, top, right, bottom = question.box
    return left / UNITS, top / UNITS, right / UNITS, bottom / UNITS
