"""The embedded model and benchmark: generated scenes, questions about them, and a tiny LLaVA that answers.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenprune.scenes.embedded import embedded_path, load_embedded
from tokenprune.scenes.samples import Sample, samples
from tokenprune.scenes.world import generate
from tokenprune.scenes.world.generate import TEST_SEEDS, TRAIN_SEEDS, SceneObject
from tokenprune.scenes.world.questions import TASKS, Question, questions


@dataclass(frozen=True)
class Scene:
    """A held-out scene: picture `[96, 96, 3]` uint8, its objects, and one question of each task that can be asked."""

    image: NDArray[np.uint8]
    ground: str
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]


def make_scene(seed: int) -> Scene:
    """Scene number `seed` of a held-out stream; the embedded model was not trained on it."""
    made = generate.scene(TEST_SEEDS[0], seed)
    return Scene(made.image, made.ground, made.objects, tuple(questions(made)))


__all__ = [
    "TASKS",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "Question",
    "Sample",
    "Scene",
    "SceneObject",
    "embedded_path",
    "load_embedded",
    "make_scene",
    "samples",
]
