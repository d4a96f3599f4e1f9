"""`tokenprune.study.tune`: spaces, halves, proposals, and small searches on the embedded model."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.errors import BudgetError, InputError, RecipeError
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import SMALLER
from tokenprune.study.tune import Space, Tuned, default_space, make_space, read_choices, read_space
from tokenprune.study.tune.halves import halves
from tokenprune.study.tune.proposals import propose

CHOOSE: dict[str, list[object]] = {
    "stages.0.scorer": ["norm", "attention"],
    "stages.0.place": ["after_vision", {"before_layer": "1/8"}],
    "stages.0.sampler": ["top_k", "max_min", "uniform"],
}


@cache
def embedded() -> tuple[Any, Any]:
    return load_embedded()


def search(space: Space, **more: Any) -> Tuned:
    given: dict[str, Any] = {"average": 0.4, "draws": 1, "packed": True, **more}
    return tp.tune(*embedded(), scene_cases(4, tasks=["colour", "counting"]), space, **given)


def facts(tuned: Tuned) -> Any:
    """All that a search tells, without times."""
    told = tuned.to_dict()
    for row in told["report"]["rows"]:
        del row["method_seconds"]
    return told, tuned.dump()


# ------------------------------------------------------------------------------------------------------------ spaces


def test_values_are_yaml_between_commas() -> None:
    told = read_choices(["stages.0.scorer=norm,{type: attention, rope: false}", "stages.0.raters=null,last_text"])
    assert told == {
        "stages.0.scorer": ["norm", {"type": "attention", "rope": False}],
        "stages.0.raters": [None, "last_text"],
    }
    for wrong in ("stages.0.scorer", "stages.0.scorer="):
        with pytest.raises(InputError, match="--choose: expected PATH=VALUE,VALUE"):
            read_choices([wrong])
    with pytest.raises(InputError, match="given twice"):
        read_choices(["stages.0.scorer=norm", "stages.0.scorer=attention"])


def test_raters_follow_what_asks_for_them() -> None:
    space, budget = make_space("fastv", CHOOSE), Budget("average", 0.4)
    assert space.size == 12
    alone = space.recipe({"stages.0.scorer": "norm"}, budget).stages[0]
    assert (alone.scorer.type, alone.raters) == ("norm", None)
    asking = make_space("divprune", {"stages.0.scorer": ["attention"], "stages.0.place": [{"before_layer": 2}]})
    (labels,) = asking.combinations()
    raters = asking.recipe(labels, budget).stages[0].raters
    assert raters is not None and raters.type == "last_text"


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        ({"stages.0.scorrer": ["norm"]}, r"did you mean 'scorer'\?"),
        ({"stages.0.scorer": ["norm", "norn"]}, r"no such part 'norn' \(did you mean 'norm'\?\)"),
        ({"stages.prun.scorer": ["norm"]}, r"no item 'prun' \(did you mean 'prune'\?\)"),
        ({"budget.average": [0.2, 0.4]}, "the budget is the same for all"),
        ({"stages.0.scorer": ["norm", "norm"]}, "norm is given twice"),
        ({"stages.0.scorer": "norm"}, "expected a list of values"),
        ({"pick": ["norm"]}, "without a dot this is a name"),
        ({}, "nothing to choose"),
    ],
)
def test_wrong_choices_are_told(choose: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, RecipeError), match=message):
        make_space("fastv", choose)


def test_a_value_is_wrong_only_if_nothing_goes_with_it() -> None:
    """The scorer `change` reads earlier layers, which `after_vision` has none of: valid before a layer alone."""
    choose = {"stages.0.place": [{"before_layer": 2}], "stages.0.scorer": ["change", "norm"]}
    assert make_space("divprune", choose).size == 2
    with pytest.raises(RecipeError, match="after_vision"):
        make_space("divprune", {"stages.0.scorer": ["change", "norm"]})


def test_files_of_spaces(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("recipe: fastv\nchoose:\n  pick:\n    - {stages.0.scorer: norm, stages.0.raters: null}\n")
    space = read_space(file)
    assert space.sets({"pick": "norm, null"}) == ['stages.0.scorer="norm"', "stages.0.raters=null"]
    for text, message in {
        "recipe: fastv\nchose: {}\n": r"unknown key 'chose' \(did you mean 'choose'\?\)",
        "recipe: fastw\nchoose: {a.b: [1]}\n": "did you mean 'fastv'",
        "recipe: fastv\nchoose: [1]\n": "expected a mapping of paths",
        "recipe: [\n": "space.yaml:",
    }.items():
        file.write_text(text)
        with pytest.raises((InputError, RecipeError), match=message):
            read_space(file)
    assert {choice.name for choice in default_space().choices} == {
        "stages.prune.place",
        "selection",
        "stages.prune.recycler",
    }


# ------------------------------------------------------------------------------------------------------------ halves


def _case(name: str, shade: int, question: str = "?") -> Case:
    return Case(lambda: Image.new("RGB", (4, 4), (shade, 0, 0)), name, question, "a")


def test_halves_share_no_picture_even_under_two_names() -> None:
    cases = [_case(f"{copy} {shade}", shade, q) for shade in range(9) for copy in ("a", "b") for q in ("1", "2")]
    for seed in range(5):
        first, second = halves(cases, seed)
        shades = [{case.picture_id.split()[1] for case in half} for half in (first, second)]
        assert not shades[0] & shades[1] and sorted(map(len, shades)) == [4, 5]
        assert len(first) + len(second) == len(cases)
    assert halves(cases, 0) == halves(list(cases), 0) != halves(cases, 1)
    with pytest.raises(InputError, match="two pictures or more"):
        halves([_case("a", 1), _case("b", 1)])


# --------------------------------------------------------------------------------------------------------- proposals


def _all_proposed(space: Space, trials: int, seed: int = 0) -> list[tuple[str, ...]]:
    made = propose(space, trials, seed)
    found = [tuple(next(made).values())]
    try:
        while True:
            good = None if "uniform" in found[-1] else float("attention" in found[-1])
            found.append(tuple(made.send(good).values()))
    except StopIteration:
        return found


def test_each_combination_is_proposed_once_and_all_in_the_end() -> None:
    space = make_space("fastv", CHOOSE)
    everything = [tuple(labels.values()) for labels in space.combinations()]
    assert _all_proposed(space, 12) == everything
    searched = _all_proposed(space, 11)
    assert searched != everything and sorted(searched) == sorted(everything)
    assert searched == _all_proposed(space, 11) != _all_proposed(space, 11, seed=1)


def test_a_search_without_optuna_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    space = make_space("fastv", CHOOSE)
    with pytest.raises(InputError, match=r"pip install 'tokenprune-vlm\[tune\]'; without it, --trials 12 tries them"):
        search(space, trials=2)
    assert len(_all_proposed(space, 12)) == 12


# ---------------------------------------------------------------------------------------------------------- searches


def test_a_search_chooses_on_one_half_and_reports_on_the_other(tmp_path: Path) -> None:
    tuned = search(make_space("fastv", CHOOSE), trials=12)
    assert tuned.skipped and "nothing runs before layer 0" in tuned.skipped[0].reason
    assert len({each.recipe.fingerprint for each in tuned.candidates}) == len(tuned.candidates)
    assert tuned.candidates[0].choices == {}
    chosen, reported = ({case.picture_id for case in half} for half in (tuned.chosen_on, tuned.report.cases))
    assert len(chosen) == len(reported) == 2 and not chosen & reported
    assert tuned.winner.right.value == max(each.right.value for each in tuned.candidates)
    assert [row.label for row in tuned.report.rows[:1]] == ["untouched"]
    assert {"tuned", "fastv", "random", "uniform", "last", SMALLER} <= {row.label for row in tuned.report.rows}
    assert tuned.reported.fingerprint == tuned.winner.recipe.fingerprint
    for label in ("random", "uniform", SMALLER):
        row = next(row for row in tuned.report.rows if row.label == label)
        wanted = tuned.reported.overall.value - row.overall.value
        pair = tuned.against(label)
        assert pair.change.value == pytest.approx(wanted)
        low, high = pair.change.ends
        assert low <= pair.change.value <= high
    for one in tuned.front:
        assert not [
            each
            for each in tuned.candidates
            if each.flops_share <= one.flops_share and each.right.value > one.right.value
        ]
    tuned.save(tmp_path / "winner.yaml", model="a\nb")
    loaded = tp.load_recipe(tmp_path / "winner.yaml")
    assert loaded.fingerprint == tuned.winner.recipe.fingerprint
    assert loaded.budget == Budget("average", 0.4)
    assert (tmp_path / "winner.yaml").read_text().startswith("# Found by `tokenprune tune` for a b: the best of")


def test_resumed_and_longer_searches_equal_uninterrupted_ones(tmp_path: Path) -> None:
    space = make_space("fastv", CHOOSE)
    whole = search(space, trials=6)

    class Killed(Exception):
        pass

    def kill(done: int, most: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        search(space, trials=6, output=tmp_path, on_trial=kill)
    journal = tmp_path / "results.jsonl"
    before = journal.read_bytes()
    assert len(before.splitlines()) > 2
    journal.write_bytes(before[:-9])  # as a kill leaves the last line
    assert facts(search(space, trials=6, output=tmp_path)) == facts(whole)
    lines = journal.read_bytes()
    assert facts(search(space, trials=6, output=tmp_path)) == facts(whole)
    assert journal.read_bytes() == lines, "nothing is asked twice"
    longer = search(space, trials=8, output=tmp_path)
    assert longer.to_dict()["candidates"][:7] == whole.to_dict()["candidates"]


def test_agreement_needs_no_answers() -> None:
    space = make_space("fastv", {"stages.0.sampler": ["top_k", "max_min"]})
    cases = [replace(case, answer="") for case in scene_cases(2, tasks=["colour"])]
    tuned = tp.tune(*embedded(), cases, space, average=0.4, trials=2, draws=1, agree=True, packed=True)
    assert tuned.report.measure == "agreement" and tuned.report.rows[0].overall.value == 1.0
    assert tuned.winner.right.value > 0


def test_wrong_arguments() -> None:
    space = make_space("fastv", {"stages.0.sampler": ["top_k", "max_min"]})
    with pytest.raises(BudgetError, match="expected one budget, average or flops, got none"):
        search(space, average=None)
    with pytest.raises(BudgetError, match="got average and flops"):
        search(space, flops=0.5)
    with pytest.raises(InputError, match="trials: expected at least 1"):
        search(space, trials=0)
    late = make_space("fastv", {"stages.0.place": [{"before_layer": "1/2"}, {"before_layer": "3/4"}]})
    with pytest.raises(InputError, match=r"no recipe of this space can run at average: 0\.01:\nfastv: budget"):
        search(late, average=0.01)
