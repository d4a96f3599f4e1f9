"""Questions: answers agree with an independent reading of the scene's objects."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenprune.scenes import make_scene
from tokenprune.scenes.world.generate import COLOURS, SHAPES, SIZES, TEST_SEEDS, Scene, scene
from tokenprune.scenes.world.plates import LETTERS
from tokenprune.scenes.world.questions import TASKS, TEMPLATES, Question, questions, words

SEED = TEST_SEEDS[3]
SINGULAR = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES if shape != "cross"}}


def described(question: Question) -> dict[str, str]:
    """Attributes that the words of a question mention (independent of how the question was made)."""
    found = {}
    for word in question.question.split():
        word = SINGULAR.get(word, word)
        for name, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
            if word in values:
                found[name] = word
    return found


def expected(item: Scene, question: Question) -> str:
    """The answer, worked out from the object list and the words of the question alone."""
    if question.task == "ground":
        return item.ground
    if question.task == "code":
        return " ".join(item.plate.code)
    if question.task == "relation":
        return related(item, question)
    matching = [o for o in item.objects if all(getattr(o, k) == v for k, v in described(question).items())]
    if question.task == "existence":
        return "yes" if matching else "no"
    if question.task == "counting":
        return str(len(matching))
    assert len(matching) == 1, (question, matching)
    if question.task == "box":
        return " ".join(str(int(edge * 19 / 96)) for edge in matching[0].box)
    if question.task == "localisation":
        return f"row {int(matching[0].y / 96 * 5) + 1} column {int(matching[0].x / 96 * 5) + 1}"
    return str(getattr(matching[0], question.task))


def related(item: Scene, question: Question) -> str:
    """Cell of the only thing that the words before the side fit, on that side of the thing after it."""
    axis, sign, side = next(
        (axis, sign, side)
        for side, axis, sign in (("left of", "x", -1), ("right of", "x", 1), ("above", "y", -1), ("below", "y", 1))
        if f" {side} " in question.question
    )
    before, after = (described(Question("", part, "", None, "")) for part in question.question.split(f" {side} "))
    (anchor,) = [o for o in item.objects if (o.colour, o.shape) == (after["colour"], after["shape"])]
    alike = [o for o in item.objects if all(getattr(o, k) == v for k, v in before.items())]
    (target,) = [o for o in alike if (getattr(o, axis) - getattr(anchor, axis)) * sign > 0]
    assert len(alike) > 1, "the relation is not needed"
    return f"row {int(target.y / 96 * 5) + 1} column {int(target.x / 96 * 5) + 1}"


def test_answers_are_right_by_construction() -> None:
    seen = Counter()
    for index in range(250):
        item = scene(SEED, index)
        for question in questions(item):
            assert question.answer == expected(item, question), question
            seen[question.task] += 1
    assert set(seen) == set(TASKS) and min(seen.values()) > 130


def test_the_box_is_the_targets_and_the_question_does_not_tell_the_answer() -> None:
    for index in range(100):
        item = scene(SEED, index)
        for question in questions(item, ["localisation", "box", "colour", "shape", "size"]):
            assert question.box in [thing.box for thing in item.objects]
            assert question.answer not in question.question.split()


def test_difficulty_names_attributes_that_single_out_the_target() -> None:
    for index in range(100):
        item = scene(SEED, index)
        for question in questions(item, ["localisation", "colour", "shape", "size"]):
            mentioned = described(question)
            needed = {name: mentioned[name] for name in question.difficulty.split("+")}
            assert sum(all(getattr(o, k) == v for k, v in needed.items()) for o in item.objects) == 1


def test_answers_are_balanced() -> None:
    answers: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for index in range(700):
        for question in questions(scene(SEED, index)):
            answers[question.task][question.answer] += 1
    for task, most in {
        "existence": 0.56,
        "counting": 0.34,
        "colour": 0.2,
        "shape": 0.25,
        "localisation": 0.08,
        "relation": 0.1,
    }.items():
        assert answers[task].most_common(1)[0][1] / answers[task].total() < most, task
    assert set(answers["counting"]) == set("012345")
    letters = Counter(letter for answer, n in answers["code"].items() for letter in answer.split() * n)
    assert set(letters) == set(LETTERS) and max(letters.values()) < 1.5 * min(letters.values())


def test_every_word_is_in_the_vocabulary_and_every_wording_occurs() -> None:
    known, asked = set(words()), set()
    for index in range(150):
        for question in questions(scene(SEED, index)):
            assert set(question.question.split()) <= known
            assert set(question.answer.split()) <= known
            asked.add(question.question)
    for templates in TEMPLATES.values():
        for template in templates:
            start = template.split("{")[0].rstrip(" ?.")
            assert any(text.startswith(start) for text in asked), template


@pytest.mark.parametrize("seed", [0, 7])
def test_make_scene_is_reproducible(seed: int) -> None:
    first, second = make_scene(seed), make_scene(seed)
    assert first.image.shape == (96, 96, 3) and first.image.dtype == "uint8"
    assert (first.image == second.image).all() and first.questions == second.questions
    assert len(first.questions) >= 6
