"""The experiment's page says what its committed results say, and its rules judge as plan.md words them."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenprune.scenes import embedded_path
from tokenprune.scenes.digest import digest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "evidence"


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """The script's module; its neighbours are imported by plain names, so they are taken out again."""
    sys.path.insert(0, str(FOLDER))
    try:
        import page

        yield page
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("page", "grid", "pictures", "verdict"):
            sys.modules.pop(name, None)


def test_pages_are_written_from_the_committed_results(page: ModuleType) -> None:
    found = page.results()
    for name, text in (("evidence.md", page.evidence(found)), ("evidence-grid.md", page.cells(found))):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run: python benchmarks/evidence/page.py"


def test_the_first_results_are_those_of_the_shipped_weights(page: ModuleType) -> None:
    shipped = page.results()[0]
    assert shipped["name"] == "seed-0"
    assert shipped["weights"] == digest(embedded_path() / "model.safetensors")
    training = json.loads((ROOT / "benchmarks" / "scenes" / "training.json").read_text())
    assert shipped["training"] == training


def test_every_run_of_the_grid_is_in_the_results(page: ModuleType) -> None:
    seeds = [each for each in page.results() if each["name"] not in page.verdict.CONTROLS]
    for each in seeds:
        assert tuple(each["counts"]) in (page.grid.COUNTS, (page.grid.MAIN_COUNT,))
        wanted = {condition.group for condition in page.grid.grid(each["counts"])}
        assert {(row["condition"], row["budget"]) for row in each["grid"]} == wanted
        assert {row["condition"] for row in each["whole"]} >= {
            *page.grid.WHOLE,
            "sparsevlm.no-recycling",
            "smaller-image",
        }
        tests = [
            "grey",
            "text only",
            "shuffled ids",
            "chosen.1",
            "chosen.2",
            *(f"oracle.{k}" for k in page.grid.LAYERS),
        ]
        assert list(each["blind"]) == tests
    for each in page.results():
        assert len(each["audits"]) == len(page.grid.LAYERS) * 3 * 2


def result(page: ModuleType) -> dict[str, Any]:
    """The committed result with every number of the rules set so that each prediction holds, by hand."""
    made = copy.deepcopy(page.results()[0])
    for found in made["audits"]:
        value = 0.5 if found["criterion"] == "attention" and found["layer"] in (1, 2) else 0.0
        found["rows"]["bias"] = {"value": value, "low": value - 0.05, "high": value + 0.05}
    for row in (*made["grid"], *made["whole"]):
        for task, cell in row["tasks"].items():
            pruned = row["condition"].startswith("attention.") and task == "localisation"
            cell["accuracy"]["value"] = 0.3 if pruned else 0.95
    for found in (*made["grid_contrasts"], *made["whole_contrasts"], made["adaptive"]):
        found["difference"] = {"value": 0.1, "low": 0.05, "high": 0.15}
    for third in made["thirds"].values():
        third["bottom-top"] = {"value": 0.1, "low": 0.05, "high": 0.15}
    for name, tasks in made["blind"].items():
        for task, cell in tasks.items():
            lost = name in ("grey", "text only") or (name, task) == ("shuffled ids", "localisation")
            cell["value"] = 0.3 if lost else 0.95
    return made


def holds(page: ModuleType, made: dict[str, Any]) -> dict[str, bool]:
    return {name: finding.holds for name, (_, finding) in page.verdict.findings(made).items()}


def test_rules_hold_where_all_predictions_come_true(page: ModuleType) -> None:
    made = result(page)
    assert all(holds(page, made).values())
    assert page.verdict.outcome([made, made]) == "reproduced"


def test_one_line_that_fails_on_one_model_makes_it_partly(page: ModuleType) -> None:
    good, bad = result(page), result(page)
    for found in bad["grid_contrasts"]:
        if (found["first"], found["second"], found["layer"]) == ("no-rope+grid", "no-rope", 2):
            found["difference"]["low"] = -0.01
    assert not holds(page, bad)["F7"]
    assert page.verdict.outcome([good, bad]) == "partly (F1, F2, F3, F4, F5, F6)"


def test_no_bias_anywhere_is_not_seen(page: ModuleType) -> None:
    made = result(page)
    for found in made["audits"]:
        found["rows"]["bias"] = {"value": 0.12, "low": 0.09, "high": 0.15}
    assert page.verdict.outcome([made]) == "not seen at this scale"
    for found in made["audits"]:
        found["rows"]["bias"]["low"] = 0.101
    assert holds(page, made)["F1"] and not holds(page, made)["F5"]


def test_a_model_below_the_gate_reproduces_nothing(page: ModuleType) -> None:
    made = result(page)
    for row in made["whole"] + made["grid"]:
        if row["condition"] == "untouched":
            row["tasks"]["localisation"]["accuracy"]["value"] = 0.84
    for row in made["grid"]:
        if row["condition"].startswith("attention."):
            row["tasks"]["localisation"]["accuracy"]["value"] = 0.1
    assert all(holds(page, made).values())
    assert page.verdict.outcome([made]).startswith("partly")


def test_collapse_needs_the_other_tasks_to_stay(page: ModuleType) -> None:
    made = result(page)
    for row in made["grid"]:
        if row["condition"].startswith("attention."):
            row["tasks"]["existence"]["accuracy"]["value"] = 0.8
    assert not holds(page, made)["F3"]


def test_sparsevlm_needs_two_budgets_of_three(page: ModuleType) -> None:
    made = result(page)
    chosen = [f for f in made["whole_contrasts"] if (f["second"], f["task"]) == ("sparsevlm.all-text", "ranked")]
    assert len(chosen) == 3
    chosen[0]["difference"]["low"] = -0.01
    assert holds(page, made)["S1"]
    chosen[1]["difference"]["low"] = -0.01
    assert not holds(page, made)["S1"]


def test_blind_tests_are_judged_as_planned(page: ModuleType) -> None:
    for name, task, value, rule in (
        ("shuffled ids", "localisation", 0.4, "B1"),
        ("shuffled ids", "ground", 0.85, "B1"),
        ("chosen.2", "existence", 0.89, "B2"),
        ("grey", "counting", 0.48, "B3"),
        ("text only", "code", 0.48, "B3"),
    ):
        made = result(page)
        made["blind"][name][task]["value"] = value
        assert [rule for rule, held in holds(page, made).items() if not held] == [rule]


def test_a_control_is_judged_by_its_own_rule(page: ModuleType) -> None:
    biases = {
        "half": 0.5,
        "no-text": 0.0,
        "uniform-text": 0.0,
        "no-rotary": 0.0,
        "reversed-ids": -0.5,
        "equal-ids": 0.0,
    }
    full = {f"{name}-full": value for name, value in biases.items() if name != "half"}
    biases |= full
    assert list(page.verdict.CONTROLS) == list(biases)
    for name, value in biases.items():
        made = result(page) | {"name": name}
        for expected, off in ((True, 0.0), (False, 0.45)):
            for found in made["audits"]:
                at = value + off if value <= 0 else value - off
                found["rows"]["bias"] = {"value": at, "low": at - 0.05, "high": at + 0.05}
            assert list(holds(page, made).values()) == [expected], (name, off)
        made["whole"][0]["tasks"]["localisation"]["accuracy"]["value"] = 0.84
        made["grid"] = []
        assert list(holds(page, made).values()) == [None]
