"""`tokenprune.study.evaluate`: cases, conditions, and small runs of the embedded model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.errors import BudgetError, InputError
from tokenprune.families.chat import Chat
from tokenprune.scenes import TASKS, load_embedded, make_scene
from tokenprune.scenes.cases import scene_cases
from tokenprune.scenes.world.questions import is_right
from tokenprune.study.evaluate import (
    SMALLER,
    UNTOUCHED,
    Case,
    Condition,
    Evaluation,
    Outcome,
    asking,
    evaluate,
    make_conditions,
    normal,
    respondent,
)
from tokenprune.study.evaluate.conditions import share_of, shrink
from tokenprune.study.statistics import Estimate, proportion


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_embedded()


def small() -> list[Condition]:
    """The untouched model, `last` at an eighth, and a smaller image."""
    every = make_conditions(["last"], [Budget("keep", 0.125)])
    return [one for one in every if one.label in ("untouched", "last", SMALLER)]


# --------------------------------------------------------------------------------------------- cases and conditions


def test_answers_count_by_their_words() -> None:
    assert normal('  "Row 3\n Column 2." ') == "row 3 column 2"
    case = Case(lambda: Image.new("RGB", (4, 4)), "p", "q", "Yes")
    assert case.right("yes.") and not case.right("yes it is")
    near = replace(case, answer="10", accepts=lambda given, answer: abs(int(given) - int(answer)) < 2)
    assert near.right("9") and not near.right("12")


def test_questions_about_scenes_count_by_their_task() -> None:
    """The same words for all tasks but `box`: there half of the union is enough, and what is no box is wrong."""
    (cell,) = scene_cases(1, tasks=("localisation",))
    assert cell.right(cell.answer.upper()) and not cell.right(cell.answer + " 1")
    box = replace(cell, answer="2 3 5 8", accepts=partial(is_right, "box"))
    assert box.right("2 3 5 8") and box.right("2 3 5 11") and not box.right("2 3 5 18")
    for wrong in ("8 3 12 8", "2 3 5", "5 3 2 8", "two 3 5 8", ""):
        assert not box.right(wrong)


def test_scene_cases_are_the_held_out_questions() -> None:
    cases = scene_cases(2, tasks=("colour", "counting"), first=5)
    asked = [q for number in (5, 6) for q in make_scene(number).questions if q.task in ("colour", "counting")]
    assert [(c.question, c.answer, c.task, c.difficulty) for c in cases] == [
        (q.question, q.answer, q.task, q.difficulty) for q in asked
    ]
    assert np.array_equal(np.asarray(cases[0].picture()), make_scene(5).image)
    assert len({case.picture_id for case in cases}) == 2
    with pytest.raises(InputError, match=r"got 'color' \(did you mean 'colour'\?\)"):
        scene_cases(1, tasks=("color",))


def test_every_budget_has_all_baselines_and_random_all_its_draws() -> None:
    made = make_conditions(["fastv:k2-r75", "random"], [Budget("average", 0.5), Budget("average", 60)], draws=3)
    assert made[0] == UNTOUCHED
    for budget in ("average: 0.5", "average: 60"):
        labels = [one.label for one in made if one.group[1] == budget]
        assert labels == ["fastv:k2-r75", *["random"] * 3, *["uniform"] * 4, "last", SMALLER]
    draws = [one for one in made if one.group == ("random", "average: 0.5")]
    assert len({one.fingerprint for one in draws}) == 3
    assert {one.recipe.to_dict()["budget"]["average"] for one in draws if one.recipe} == {0.5}
    phases = [one.recipe for one in made if one.group == ("uniform", "average: 0.5")]
    assert [one.to_dict()["stages"][0]["sampler"]["phase"] for one in phases if one] == [0, 1, 2, 3]
    assert [one.label for one in make_conditions(["fastv"])] == ["untouched", "fastv"]
    assert [one.label for one in make_conditions(["uniform"], draws=1)] == ["untouched", "uniform"]
    for recipes, message in ((["fastv", "fastv"], "asked for twice: fastv"), ([], "nothing to compare")):
        with pytest.raises(InputError, match=message):
            make_conditions(recipes)


def test_overrides_change_the_recipes_and_no_baseline() -> None:
    sets = ["stages.0.scorer.rope=false"]
    plain, changed = (make_conditions(["fastv"], [Budget("keep", 0.5)], sets=s) for s in ((), sets))
    for one, other in zip(plain, changed, strict=True):
        assert (one.group, one.seed) == (other.group, other.seed)
        assert (one.fingerprint != other.fingerprint) == (one.label == "fastv")
    recipe = tp.load_recipe("fastv")
    assert make_conditions([recipe], sets=sets)[1].fingerprint == make_conditions(["fastv"], sets=sets)[1].fingerprint
    strided = tp.load_recipe("uniform", sets=["stages.0.sampler.stride=2"])
    assert len(make_conditions([strided])) == 2  # a stride has an offset, and no phase


@pytest.mark.parametrize("value", [0.25, 36, 0.5, 100, 1.0, 144, 200])
def test_smaller_image_has_the_tokens_worth_of_pixels(value: float) -> None:
    picture, share = shrink(Image.new("RGB", (96, 60)), share_of(Budget("keep", value), 144))
    wanted = min(1.0, value if isinstance(value, float) else value / 144)
    assert share == picture.width * picture.height / (96 * 60)
    assert 0.93 * wanted <= share <= wanted


# ------------------------------------------------------------------------------------------------------------- runs


def test_run_measures_what_it_says(embedded: tuple[Any, Any]) -> None:
    result = evaluate(*embedded, scene_cases(3), small(), batch_size=8)
    rows = {row.label: row for row in result.rows}
    assert (rows["untouched"].average, rows["untouched"].final, rows["untouched"].change) == (
        144,
        144,
        Estimate(0, 0, 0),
    )
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


def test_flops_are_the_ledgers_at_the_tokens_that_ran(embedded: tuple[Any, Any]) -> None:
    """Fixed counts: the ledger's own. Adaptive ones: the ledger's at the counts of the report, whatever it expects."""
    model, processor = embedded
    cases = scene_cases(2, tasks=("ground", "shape"))
    conditions = [*small(), *make_conditions(["fastv", "sparsevlm"])[1:]]
    result = evaluate(model, processor, cases, conditions, batch_size=3)
    found = {outcome.condition.label: outcome for outcome in result.outcomes}
    prompts = [Chat("", model, processor).prompt(case.question, 1) for case in cases]
    texts = [len(processor.tokenizer(text)["input_ids"]) - 1 for text in prompts]  # but the one of the picture
    start = found["untouched"].flops
    for place, text in enumerate(texts):
        told = tp.ledger(model, conditions[1].recipe, tokens=144, text=text)
        assert start[place] == told.untouched.prefill
        assert found["last"].flops[place] == told.reduced.prefill
        assert told.untouched.prefill == told.untouched.end_to_end - told.untouched.decode
        fastv = tp.ledger(model, "fastv", tokens=144, text=text, question=text - 1).reduced  # BOS is before the picture
        assert fastv.method > 0 and found["fastv"].flops[place] == fastv.prefill
    assert found[SMALLER].flops == start  # a fixed grid: it costs as much as the whole picture
    shares = {row.label: row.flops_share for row in result.rows}
    assert shares["untouched"] == shares[SMALLER] == 1 > shares["sparsevlm"]
    assert shares["last"] == pytest.approx(sum(found["last"].flops) / sum(start))


def test_watching_the_untouched_model_changes_nothing(embedded: tuple[Any, Any]) -> None:
    """It runs with the recipe `none`, to learn tokens and grids: bit for bit the bare model."""
    model, processor = embedded
    case = scene_cases(1)[0]
    chat = Chat("", model, processor)
    inputs = processor(images=[case.picture()], text=chat.prompt(case.question, 1), return_tensors="pt")
    with torch.no_grad():
        bare = model(**inputs).logits
        with tp.attach(model, "none"):
            watched = model(**inputs).logits
    assert torch.equal(bare, watched)
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    (outcome,) = evaluate(model, processor, [case], []).outcomes
    assert outcome.answers == [chat.text(ids[0, inputs["input_ids"].shape[1] :])]


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

    monkeypatch.setattr(respondent, "ask", counted)
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


def test_all_that_it_takes_is_at_the_front_door(embedded: tuple[Any, Any]) -> None:
    conditions = tp.make_conditions(["fastv"], [tp.Budget("keep", 0.5)], baselines=False)
    cases = tp.scene_cases(1, tasks=("ground",))
    asked = tp.Case(cases[0].picture, "mine", cases[0].question, cases[0].answer)
    told = [tp.evaluate(*embedded, given, conditions) for given in (cases, [asked])]
    assert [o.answers for o in told[0].outcomes] == [o.answers for o in told[1].outcomes]


def test_results_of_another_model_or_question_are_not_taken(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    cases = scene_cases(1, tasks=("ground",))
    short: dict[str, Any] = {"output": tmp_path, "max_new_tokens": 4}
    evaluate(*embedded, cases, [], **short)
    evaluate(*embedded, [replace(cases[0], question="is there a red circle ?")], [], **short)
    changed, processor = load_embedded()
    changed.lm_head.weight.data.mul_(-1)
    worse = evaluate(changed, processor, cases, [], **short)
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
    (tmp_path / "results.jsonl").write_text("my notes\nare long")
    with pytest.raises(InputError, match=r"results\.jsonl:1: error: not a result"):
        evaluate(*embedded, scene_cases(1), [], output=tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == "my notes\nare long"


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
        flops = [200 if condition == UNTOUCHED else 50] * 20
        return Outcome(condition, ["a"] * 20, right, [16] * 20, [8.0] * 20, [4.0] * 20, flops, 0.2)

    untouched = outcome(UNTOUCHED, [True] * 18 + [False] * 2)
    draws = [outcome(Condition("r", seed=seed), [i % 2 == seed for i in range(10)] + [True] * 10) for seed in range(2)]
    result = Evaluation(cases, [untouched, *draws])
    assert result.ranked == ("strong",)
    row = result.rows[1]
    assert (row.draws, row.overall.value, row.change.value) == (2, 0.5, -0.5)
    assert (row.tasks["weak"].value, row.changes["weak"].value) == (1.0, pytest.approx(0.2))
    assert row.seconds == pytest.approx(0.2 / 20)
    assert (row.flops, row.flops_share, result.rows[0].flops_share) == (50, 0.25, 1)
    assert result.to_dict()["tasks"]["weak"] == {"questions": 10, "ranked": False, "difficulties": {}}
    assert row.difficulties == {}


def test_tasks_stand_by_rank_then_as_they_come() -> None:
    ranks = (("b", 1), ("z", 0), ("c", 1), ("a", 0), ("b", 1))
    blank = Case(lambda: Image.new("RGB", (4, 4)), "", "q", "a")
    cases = [replace(blank, picture_id=str(i), task=task, rank=rank) for i, (task, rank) in enumerate(ranks)]
    assert list(Evaluation(cases, []).tasks.items()) == [("z", 1), ("a", 1), ("b", 2), ("c", 1)]
    assert list(Evaluation(scene_cases(3), []).tasks) == list(TASKS)


def test_accuracy_by_difficulty() -> None:
    """Of two tasks one says how difficult it is: six questions are easy, four of them right; two hard, none right."""
    tags = ["easy"] * 6 + ["hard"] * 2 + [""] * 2
    cases = [
        Case(lambda: Image.new("RGB", (4, 4)), str(i), "q", "a", "t" if i < 8 else "u", tag)
        for i, tag in enumerate(tags)
    ]
    right = [i < 4 or i > 7 for i in range(10)]
    result = Evaluation(cases, [Outcome(UNTOUCHED, ["a"] * 10, right, [4] * 10, [4.0] * 10, [4.0] * 10, [9] * 10, 0)])
    assert result.difficulties == {"t": {"easy": 6, "hard": 2}}
    found = result.rows[0].difficulties["t"]
    assert found["easy"] == proportion(4, 6) and found["hard"] == proportion(0, 2)
    plain = result.to_dict()
    assert plain["tasks"]["t"]["difficulties"] == {"easy": 6, "hard": 2}
    assert plain["rows"][0]["tasks"]["t"]["difficulties"]["hard"]["value"] == 0
    assert plain["rows"][0]["tasks"]["u"]["difficulties"] == {}


def test_every_two_conditions_of_a_budget_are_compared() -> None:
    """The second recipe misses two of the questions that the first gets right, in two of ten pictures."""
    cases = [Case(lambda: Image.new("RGB", (4, 4)), str(i), "q", "a") for i in range(10)]
    budgets = (Budget("keep", 0.5), Budget("keep", 0.25))
    arms = [(UNTOUCHED, 0), *((Condition(name, budget=b), n) for b in budgets for name, n in (("x", 3), ("y", 1)))]
    result = Evaluation(
        cases,
        [
            Outcome(c, ["a"] * 10, [i >= n for i in range(10)], [16] * 10, [8.0] * 10, [8.0] * 10, [9] * 10, 0)
            for c, n in arms
        ],
    )
    assert [(p.budget, p.first, p.second) for p in result.pairs] == [("keep: 0.5", "y", "x"), ("keep: 0.25", "y", "x")]
    change = result.pairs[0].change
    assert change.value == pytest.approx(0.2) and 0 <= change.low < 0.2 < change.high <= 0.6
    assert [(pair.p, pair.p_holm) for pair in result.pairs] == [(0.5, 1)] * 2  # two pictures differ, both for y
    assert [pair["first"] for pair in result.to_dict()["pairs"]] == ["y", "y"]


def test_baselines_are_compared_with_recipes_and_only_alone_with_each_other() -> None:
    cases = [Case(lambda: Image.new("RGB", (4, 4)), str(i), "q", "a") for i in range(4)]

    def pairs(*arms: Condition) -> list[tuple[str, str]]:
        numbers = [4] * 4, [4.0] * 4, [4.0] * 4, [9] * 4
        outcomes = [Outcome(c, ["a"] * 4, [True] * 4, *numbers, 0) for c in (UNTOUCHED, *arms)]
        return [(pair.first, pair.second) for pair in Evaluation(cases, outcomes).pairs]

    x, u, v = (Condition(name, budget=Budget("keep", 0.5), baseline=name != "x") for name in "xuv")
    assert pairs(x, u, v) == [("x", "u"), ("x", "v")]
    assert pairs(u, v) == [("u", "v")]
    assert pairs() == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_budget_of_flops_gives_all_the_same_work(embedded: tuple[Any, Any], packed: bool) -> None:
    """All come close to the share from below, but the smaller image: its fixed grid costs what it costs."""
    budget = Budget("flops", 0.8)
    result = evaluate(*embedded, scene_cases(2), make_conditions(["fastv"], [budget], draws=1), packed=packed)
    untouched, *others = result.outcomes
    for outcome in others:
        spent = np.array(outcome.flops) / np.array(untouched.flops)
        if outcome.condition.label == "smaller-image":
            even = next(each for each in others if each.condition.label == "uniform")
            assert max(outcome.average) <= max(even.final) and min(outcome.average) > 0.9 * min(even.final) - 8
        else:
            assert spent.max() <= 0.8 and spent.min() > 0.79, outcome.condition.label
