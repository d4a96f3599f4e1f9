"""`evaluate(packed=True)`: the same outcomes as by `generate`, from whole runs and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import build
from kinds import fixed, recipe

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.cli.main import call
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.chat import Chat
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.evaluate import Case, Condition, Outcome, evaluate, make_conditions
from tokenprune.study.evaluate.packing import PackedAsker


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_embedded()


def told(outcomes: list[Outcome]) -> list[tuple[Any, ...]]:
    """All but times."""
    return [(o.condition, o.answers, o.right, o.total, o.average, o.final) for o in outcomes]


def test_outcomes_are_those_of_generate(embedded: tuple[Any, Any]) -> None:
    """Recipes that look at the question, all baselines, a smaller image; whole pictures and parts of one."""
    cases = scene_cases(4)
    conditions = make_conditions(["sparsevlm"], [Budget("average", 0.6)], draws=1)
    expected = told(evaluate(*embedded, cases, conditions).outcomes)
    assert any(one[1] != expected[0][1] for one in expected[1:]), "nothing changes an answer"
    for size in (64, 3):
        assert told(evaluate(*embedded, cases, conditions, packed=True, batch_size=size).outcomes) == expected


def test_a_recipe_whose_questions_cannot_share_caches_is_asked_by_generate(embedded: tuple[Any, Any]) -> None:
    """`kv: all_layers`, with counts of each question's own; some answers go beyond a word, so caches are read."""
    cases = scene_cases(3)
    conditions = make_conditions(["glimpseprune"])
    expected = told(evaluate(*embedded, cases, conditions).outcomes)
    assert expected[1][1] != expected[0][1] and max(len(answer.split()) for answer in expected[1][1]) > 1
    assert told(evaluate(*embedded, cases, conditions, packed=True, batch_size=8).outcomes) == expected


@pytest.mark.parametrize("looks", [False, True], ids=["blind", "looking"])
def test_questions_that_do_not_see_all_of_their_picture(looks: bool, embedded: tuple[Any, Any]) -> None:
    """What skips has left the caches before a question reads its picture's, or before an answer does."""
    looking = {"raters": "last_text", "scorer": "attention"} if looks else {"sampler": "uniform"}
    parts = {"scheduler": fixed(4), "recycler": "summary", "dropped": "skip_ffn", **looking}
    made = tp.load_recipe(recipe("skips", {"place": {"before_layer": 2}, **parts}))
    cases, conditions = scene_cases(3, tasks=["box", "code"]), [Condition("skips", recipe=made)]
    expected = told(evaluate(*embedded, cases, conditions).outcomes)
    assert expected[1][1] != expected[0][1] and min(len(answer.split()) for answer in expected[1][1]) > 1
    assert told(evaluate(*embedded, cases, conditions, packed=True, batch_size=8).outcomes) == expected


def test_pictures_apart_are_those_of_generate(embedded: tuple[Any, Any]) -> None:
    """A batch of several pictures, each in a prompt of its own: counts are each picture's, packed or not."""
    stages = [
        {"place": "after_vision", "scorer": "norm", "scheduler": fixed(0.3), "recycler": "nearest"},
        {"place": "after_vision", "sampler": "uniform", "scheduler": fixed(20)},
    ]
    made = tp.load_recipe({**recipe("apart", *stages), "pictures": "apart"})
    cases, conditions = scene_cases(3, tasks=["colour", "shape", "counting"]), [Condition("apart", recipe=made)]
    expected = evaluate(*embedded, cases, conditions).outcomes
    assert told(evaluate(*embedded, cases, conditions, packed=True).outcomes) == told(expected)
    assert expected[1].final == [20] * len(cases) and expected[1].answers != expected[0].answers


def test_batches_keep_pictures_whole() -> None:
    cases = [Case(lambda: None, picture, str(n), "a") for n, picture in enumerate("aabbbbbaccd")]  # type: ignore[arg-type,return-value]
    assert list(PackedAsker.batches(cases, 4)) == [[0, 1, 7], [2, 3, 4, 5], [6, 8, 9, 10]]
    assert list(PackedAsker.batches(cases, 1)) == [[n] for n in (0, 1, 7, 2, 3, 4, 5, 6, 8, 9, 10)]


def test_packed_run_goes_on_where_it_stopped(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    cases = scene_cases(3)
    conditions = make_conditions(["last"], [Budget("keep", 0.125)], baselines=False)
    first = evaluate(*embedded, cases, conditions, packed=True, batch_size=8, output=tmp_path)
    lines = (tmp_path / "results.jsonl").read_text()
    again = evaluate(*embedded, cases, conditions, packed=True, batch_size=8, output=tmp_path)
    assert told(again.outcomes) == told(first.outcomes)
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_prompts_are_kept_up_to_a_size(embedded: tuple[Any, Any]) -> None:
    chat = Chat("", *embedded)
    cases = scene_cases(1)
    packer = PackedAsker(chat)
    prompt = packer.prompt(cases)
    assert packer.prompt(cases) is prompt
    other = packer.prompt(cases, [cases[0].picture().rotate(90)] * len(cases))
    assert not other.prefix.equal(prompt.prefix) and packer.prompt(cases) is prompt
    small = PackedAsker(chat, kept_bytes=1000)
    assert small.prompt(cases) is not small.prompt(cases)


def test_models_that_cannot_are_told_why_before_anything_runs(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"packed: a picture of Qwen2-VL .*; ask it by generate"):
        evaluate(build("qwen2_vl"), embedded[1], scene_cases(1), [], packed=True, output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_command_line_packs_scenes_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "fastv", "--keep", "0.5", "--scenes", "2", "--seeds", "1"]
    found = []
    for option in ([], ["--packed"], ["--no-packed"]):
        assert call([*arguments, "--json", *option]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [facts["packed"] for facts in found] == [True, True, False]
    for facts in found:
        for row in facts["rows"]:
            del row["method_seconds"]
    assert found[0]["rows"] == found[1]["rows"] == found[2]["rows"]
    assert call([*arguments, "--task", "colour"]) == 0
    assert "asked packed" in capsys.readouterr().out
