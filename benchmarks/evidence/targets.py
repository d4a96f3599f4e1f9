"""Where the object is that a question of localisation asks for."""

from __future__ import annotations

from functools import cache

import grid

from tokenprune.scenes import make_scene
from tokenprune.study.evaluate import Case

Box = tuple[float, float, float, float]


def target(case: Case) -> Box:
    """Left, top, right and bottom of the object that `case` asks for, in scene units."""
    return _boxes()[case.question, int(case.picture_id.split()[1])]


@cache
def _boxes() -> dict[tuple[str, int], Box]:
    return {
        (question.question, number): question.box
        for number in range(grid.SCENES)
        for question in make_scene(number).questions
        if question.task == "localisation" and question.box is not None
    }
