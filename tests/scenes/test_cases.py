"""Held-out scenes as cases: their targets, their order, and the stream of questions that `audit` asks."""

from __future__ import annotations

from itertools import islice

import pytest

from tokenprune.scenes import TASKS, make_scene
from tokenprune.scenes.cases import localisation_cases, scene_cases


def test_targets_are_the_boxes_of_the_things_asked_for() -> None:
    asked = make_scene(0).questions
    for case, question in zip(scene_cases(1), asked, strict=True):
        assert (case.target is None) == (question.box is None)
        if case.target is not None and question.box is not None:
            assert case.target == pytest.approx([side / 96 for side in question.box])
            assert all(0 <= side <= 1 for side in case.target)
    assert {question.box is None for question in asked} == {True, False}


def test_cases_know_the_place_of_their_task() -> None:
    assert all(TASKS[case.rank] == case.task for case in scene_cases(3))


def test_localisation_goes_on_from_scene_to_scene() -> None:
    found = list(islice(localisation_cases(), 5))
    assert [case.key for case in found] == [case.key for case in scene_cases(9, tasks=("localisation",))[:5]]
    assert {case.task for case in found} == {"localisation"} and all(case.target is not None for case in found)
