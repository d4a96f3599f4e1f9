"""`tokenprune.evaluate`: statistics against closed forms, and small runs of the embedded model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenprune.budget import Budget
from tokenprune.errors import BudgetError, InputError
from tokenprune.evaluate import (
    SMALLER,
    UNTOUCHED,
    Case,
    Condition,
    Evaluation,
    Outcome,
    accuracy,
    asking,
    difference,
    evaluate,
    make_conditions,
    normal,
    scene_cases,
    wilson,
)
from tokenprune.evaluate import run as runs
from tokenprune.evaluate.conditions import shrink
from tokenprune.evaluate.statistics import resampled_means
from tokenprune.scenes import TASKS, load_embedded, make_scene


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_embedded()


def small() -> list[Condition]:
    """The untouched model, `last` at an eighth, and a smaller image."""
    every = make_conditions(["last"], [Budget("keep", 0.125)])
    return [one for one in every if one.label in ("untouched", "last", SMALLER)]


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (7, 20), (90, 100)])
def test_wilson_ends_solve_the_score_equation(right: int, n: int) -> None:
    """Its ends are the shares p from which the observed share lies exactly z standard errors of p away."""
    z = 1.7
    low, high = wilson(right, n, z=z)
    for end in (low, high):
        assert (right / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1 and low < high


def test_wilson_known_value_and_refusals() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    for right, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError, match="wilson: expected 0 to n successes"):
            wilson(right, n)


def test_bootstrap_of_single_questions_has_the_binomial_error() -> None:
    scores = (np.arange(400) % 10 < 7).astype(float)
    means = resampled_means(scores, range(400), draws=20_000)
    assert means.mean() == pytest.approx(0.7, abs=1e-3)
    assert means.std() == pytest.approx(math.sqrt(0.7 * 0.3 / 400), rel=0.03)


def test_bootstrap_keeps_the_questions_of_a_picture_together() -> None:
    """Five copies of each answer say no more than one: the error stays that of the pictures."""
    once = (np.arange(200) % 2).astype(float)
    means = resampled_means(np.repeat(once, 5), np.repeat(np.arange(200), 5).tolist(), draws=20_000)
    assert means.std() == pytest.approx(math.sqrt(0.25 / 200), rel=0.03)


def test_paired_difference_is_narrower_where_arms_agree() -> None:
    """Per-question differences are +1, -1 and 0 with shares b, c and the rest: variance (b + c - (b - c)²) / n."""
    first = np.concatenate([np.ones(500), np.zeros(500)])
    second = first.copy()
    second[:60], second[500:520] = 0, 1
    found = difference(second, first, list(range(1000)))
    assert found.value == pytest.approx(-0.04)
    error = math.sqrt((0.08 - 0.04**2) / 1000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.08)
    assert found == difference(second, first, list(range(1000)))


def test_identical_arms_differ_by_exactly_nothing() -> None:
    scores = (np.arange(30) % 3 == 0).astype(float)
    assert difference(scores, scores, [i // 3 for i in range(30)]) == (0.0, 0.0, 0.0)


def test_accuracy_takes_wilson_where_questions_are_independent() -> None:
    scores = np.array([1.0] * 18 + [0.0] * 2)
    assert accuracy(scores, list(range(20)))[1:] == wilson(18, 20)
    assert accuracy(np.ones(20), [i // 4 for i in range(20)])[1:] == wilson(5, 5)  # nothing to resample
    clustered = accuracy(scores, [i // 4 for i in range(20)])
    assert clustered.value == 0.9 and clustered.low < 0.9 < clustered.high
    with pytest.raises(InputError, match="got 2 for 3"):
        accuracy(np.ones(3), [1, 2])


# --------------------------------------------------------------------------------------------- cases and conditions


def test_answers_count_by_their_words() -> None:
    assert normal('  "Row 3\n Column 2." ') == "row 3 column 2"
    case = Case(lambda: Image.new("RGB", (4, 4)), "p", "q", "Yes")
    assert case.right("yes.") and not case.right("yes it is")


def test_scene_cases_are_the_held_out_questions() -> None:
    cases = scene_cases(2, tasks=("colour", "counting"), first=5)
    asked = [q for number in (5, 6) for q in make_scene(number).questions if q.task in ("colour", "counting")]
    assert [(c.question, c.answer, c.task) for c in cases] == [(q.question, q.answer, q.task) for q in asked]
    assert np.array_equal(np.asarray(cases[0].picture()), make_scene(5).image)
    assert len({case.picture_id for case in cases}) == 2
    with pytest.raises(InputError, match=r"got 'color' \(did you mean 'colour'\?\)"):
        scene_cases(1, tasks=("color",))


def test_every_budget_has_all_baselines_and_random_all_its_draws() -> None:
    made = make_conditions(["fastv:k2-r75", "random"], [Budget("average", 0.5), Budget("average", 60)], draws=3)
    assert made[0] == UNTOUCHED
    for budget in ("average: 0.5", "average: 60"):
        labels = [one.label for one in made if one.group[1] == budget]
        assert labels == ["fastv:k2-r75", "random", "random", "random", "uniform", "last", SMALLER]
    draws = [one for one in made if one.group == ("random", "average: 0.5")]
    assert len({one.fingerprint for one in draws}) == 3
    assert {one.recipe.to_dict()["budget"]["average"] for one in draws if one.recipe} == {0.5}
    assert [one.label for one in make_conditions(["fastv"])] == ["untouched", "fastv"]
    for recipes, message in ((["fastv", "fastv"], "asked for twice: fastv"), ([], "nothing to compare")):
        with pytest.raises(InputError, match=message):
            make_conditions(recipes)


@pytest.mark.parametrize("value", [0.25, 36, 0.5, 100, 1.0, 144, 200])
def test_smaller_image_has_the_tokens_worth_of_pixels(value: float) -> None:
    picture, share = shrink(Image.new("RGB", (96, 60)), Budget("keep", value), 144)
    wanted = min(1.0, value if isinstance(value, float) else value / 144)
    assert share == picture.width * picture.height / (96 * 60)
    assert 0.93 * wanted <= share <= wanted


# ------------------------------------------------------------------------------------------------------------- runs


def test_run_measures_what_it_says(embedded: tuple[Any, Any]) -> None:
    result = evaluate(*embedded, scene_cases(3), small(), batch_size=8)
    rows = {row.label: row for row in result.rows}
    assert (rows["untouched"].average, rows["untouched"].final, rows["untouched"].change) == (144, 144, (0, 0, 0))
    assert (rows["last"].average, rows["last"].final, rows["last"].baseline) == (18, 18, True)
    assert 17 <= rows[SMALLER].average <= 18
    assert rows["last"].seconds > 0 == rows["untouched"].seconds
    assert rows["untouched"].overall.value > rows["last"].overall.value  # an eighth of the picture is not enough
    for row in result.rows:
        right = [o.right for o in result.outcomes if o.condition.label == row.label]
        counted = [ok for case, ok in zip(result.cases, right[0], strict=True) if case.task in result.ranked]
        assert row.overall.value == pytest.approx(np.mean(counted))
    assert set(result.tasks) <= set(TASKS)


def test_answers_are_those_of_one_question_at_a_time(embedded: tuple[Any, Any]) -> None:
    cases = scene_cases(1)
    batched = evaluate(*embedded, cases, small())
    single = evaluate(*embedded, cases, small(), batch_size=1)
    assert [o.answers for o in batched.outcomes] == [o.answers for o in single.outcomes]
    for one, other in zip(batched.outcomes, single.outcomes, strict=True):
        assert one.average == pytest.approx(other.average)


def test_killed_run_goes_on_and_loses_nothing(
    embedded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, calls = scene_cases(2), []
    whole = evaluate(*embedded, cases, small(), batch_size=5)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return asking.ask(*args, **kwargs)

    monkeypatch.setattr(runs, "ask", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*embedded, cases, small(), batch_size=5, output=tmp_path)
    file = tmp_path / "results.jsonl"
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as broken:
        broken.write('{"key": "0123", "answ')  # what a kill in the middle of a write leaves
    again = evaluate(*embedded, cases, small(), batch_size=5, output=tmp_path)
    batches = 3 * math.ceil(len(cases) / 5)
    assert len(calls) == 5 + batches - 4
    assert [o.answers for o in again.outcomes] == [o.answers for o in whole.outcomes]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == batches
    evaluate(*embedded, cases, small(), batch_size=5, output=tmp_path)
    assert len(calls) == 5 + batches - 4  # all there: nothing runs again


def test_results_of_another_model_or_question_are_not_taken(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    cases = scene_cases(1, tasks=("ground",))
    evaluate(*embedded, cases, [], output=tmp_path)
    evaluate(*embedded, [replace(cases[0], question="is there a red circle ?")], [], output=tmp_path)
    changed, processor = load_embedded()
    changed.lm_head.weight.data.mul_(-1)
    worse = evaluate(changed, processor, cases, [], output=tmp_path, max_new_tokens=4)
    assert not worse.outcomes[0].right[0]
    lines = [json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(set(lines)) == 3


def test_budgets_share_a_folder_and_never_mix(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    """FastV acts before layer 1 of 8: (144 + 7 x 72) / 8 and (144 + 7 x 36) / 8 tokens a layer."""
    cases = scene_cases(1, tasks=("ground",))
    for value, average in ((0.5, 81), (0.25, 49.5)):
        conditions = make_conditions(["fastv"], [Budget("keep", value)], baselines=False)
        result = evaluate(*embedded, cases, conditions, output=tmp_path)
        assert (result.rows[1].average, result.rows[1].final) == (average, value * 144)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3  # the untouched model ran once


def test_foreign_results_file_is_refused_untouched(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match=r"results\.jsonl:1: error: not a result"):
        evaluate(*embedded, scene_cases(1), [], output=tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == "my notes\n"


def test_all_misfits_are_told_before_anything_runs(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    conditions = make_conditions(["fastv", "feather"], [Budget("average", 0.1)])
    with pytest.raises(BudgetError, match=r"(?s)fastv: budget average: 0\.1.*\nfeather: budget average: 0\.1"):
        evaluate(*embedded, scene_cases(1), conditions, output=tmp_path)
    assert not list(tmp_path.iterdir())
    cases = scene_cases(1)
    with pytest.raises(InputError, match="asked twice about scene 0"):
        evaluate(*embedded, [*cases, cases[0]], [])


def test_weak_tasks_are_shown_but_not_ranked() -> None:
    """Two tasks of ten questions, the untouched model right on 10 and on 8 of them: only the first one counts."""
    cases = [
        Case(lambda: Image.new("RGB", (4, 4)), str(i), "q", "a", "strong" if i < 10 else "weak") for i in range(20)
    ]

    def outcome(condition: Condition, right: list[bool]) -> Outcome:
        return Outcome(condition, ["a"] * 20, right, [16] * 20, [8.0] * 20, [4.0] * 20, 0.2)

    untouched = outcome(UNTOUCHED, [True] * 18 + [False] * 2)
    draws = [outcome(Condition("r", seed=seed), [i % 2 == seed for i in range(10)] + [True] * 10) for seed in range(2)]
    result = Evaluation(cases, [untouched, *draws])
    assert result.ranked == ("strong",)
    row = result.rows[1]
    assert (row.draws, row.overall.value, row.change.value) == (2, 0.5, -0.5)
    assert (row.tasks["weak"].value, row.changes["weak"].value) == (1.0, pytest.approx(0.2))
    assert row.seconds == pytest.approx(0.2 / 20)
    assert result.to_dict()["tasks"]["weak"] == {"questions": 10, "ranked": False}


def test_every_two_conditions_of_a_budget_are_compared() -> None:
    """The second recipe misses two of the questions that the first gets right, in two of ten pictures."""
    cases = [Case(lambda: Image.new("RGB", (4, 4)), str(i), "q", "a") for i in range(10)]
    budgets = (Budget("keep", 0.5), Budget("keep", 0.25))
    arms = [(UNTOUCHED, 0), *((Condition(name, budget=b), n) for b in budgets for name, n in (("x", 3), ("y", 1)))]
    result = Evaluation(
        cases,
        [Outcome(c, ["a"] * 10, [i >= n for i in range(10)], [16] * 10, [8.0] * 10, [8.0] * 10, 0) for c, n in arms],
    )
    assert [(p.budget, p.first, p.second) for p in result.pairs] == [("keep: 0.5", "y", "x"), ("keep: 0.25", "y", "x")]
    change = result.pairs[0].change
    assert change.value == pytest.approx(0.2) and 0 <= change.low < 0.2 < change.high <= 0.6
    assert [pair["first"] for pair in result.to_dict()["pairs"]] == ["y", "y"]
