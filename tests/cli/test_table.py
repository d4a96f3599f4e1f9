"""`tokenprune table` on files as lmms-eval 0.7.3 and `eval --json` write them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenprune.cli.paper_layout import notes
from tokenprune.errors import InputError
from tokenprune.study.paper import paper_table, read_runs

QUESTIONS = 40


def lmms(
    folder: Path,
    recipe: str,
    budget: str,
    right: dict[str, Sequence[float]],
    *,
    samples: bool = True,
    date: str = "20260101_000000",
    model: str = "folder",
    metric: str = "exact_match",
) -> None:
    """A run as lmms-eval writes it: names and keys are those of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"results": {}, "configs": {}, "higher_is_better": {}, "group_subtasks": {}, "n-samples": {}}
    told["config"] = {"model": "tokenprune", "model_args": f"pretrained={model},recipe={recipe}{budget}"}
    for task, scores in right.items():
        value = float(np.mean(scores))
        told["results"][task] = {"alias": task, f"{metric},none": value, f"{metric}_stderr,none": 0.1}
        told["results"][task] |= {f"{metric}_stderr_clustered,none": "N/A", "f1,none": value / 2}
        told["higher_is_better"][task] = {metric: True, "f1": True}
        told["n-samples"][task] = {"original": len(scores), "effective": len(scores)}
        if samples:
            lines = [
                {"doc_id": number, "input": f"question {number}", "target": "yes", metric: score, "f1": score}
                for number, score in enumerate(scores)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{date}_samples_{task}.jsonl").write_text(text)
    (folder / f"{date}_results.json").write_text(json.dumps(told))


def draws(seed: int, share: float) -> list[float]:
    return [float(each) for each in np.random.default_rng(seed).random(QUESTIONS) < share]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three methods on two tasks."""
    both = {"gqa": draws(0, 0.9), "pope": draws(1, 0.8)}
    lmms(tmp_path / "none", "none", "", both)
    lmms(tmp_path / "fastv", "fastv", ",average=0.5", {"gqa": draws(2, 0.6), "pope": both["pope"]})
    lmms(tmp_path / "feather", "feather", ",average=0.5", {"gqa": both["gqa"], "pope": draws(3, 0.7)})
    return tmp_path


def test_rows_are_the_files_own_scores_and_pairs_are_paired(runs: Path, cli: Callable[..., Any]) -> None:
    told = json.loads(cli("table", runs, "--json").out)
    assert [(row["method"], row["budget"]) for row in told["rows"]] == [
        ("untouched", ""),
        ("fastv", "average: 0.5"),
        ("feather", "average: 0.5"),
    ]
    base, fastv, feather = (row["tasks"] for row in told["rows"])
    assert base["gqa"]["score"] == np.mean(draws(0, 0.9)) and base["gqa"]["relative"] is None
    assert fastv["gqa"]["relative"]["value"] == pytest.approx(np.mean(draws(2, 0.6)) / np.mean(draws(0, 0.9)))
    # The same answers: not a hair of an interval, which unpaired ones would have.
    assert fastv["pope"]["relative"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    low, high = (fastv["gqa"]["relative"][end] for end in ("low", "high"))
    assert low < fastv["gqa"]["relative"]["value"] < high and 0.1 < high - low < 0.6
    mean = told["rows"][2]["mean"]
    assert mean["value"] == pytest.approx((1 + feather["pope"]["relative"]["value"]) / 2)
    half = (feather["pope"]["relative"]["high"] - feather["pope"]["relative"]["low"]) / 2
    assert mean["high"] - mean["low"] == pytest.approx(half)  # the other task's does not vary


def test_text_markdown_and_csv_tell_the_same(runs: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    plain = cli("table", runs, "--csv", tmp_path / "t.csv")
    assert (plain.status, plain.err) == (0, "")
    lines = plain.out.splitlines()
    notes = lines.index("score: exact_match")
    assert all(len(line.rstrip()) <= 80 for line in lines[:notes])
    rows = list(csv.DictReader(StringIO((tmp_path / "t.csv").read_text())))
    assert [(row["method"], row["task"]) for row in rows[2:5]] == [
        ("fastv", "gqa"),
        ("fastv", "pope"),
        ("fastv", "mean"),
    ]
    marked = cli("table", runs, "--markdown").out
    for row in rows:
        if row["score"]:
            assert f"{100 * float(row['score']):.1f}" in plain.out and f"{100 * float(row['score']):.1f}" in marked
        if row["relative"]:
            told = f"{100 * float(row['relative']):.1f} {100 * float(row['relative_low']):.0f}–"
            assert told in plain.out and told in marked
    assert "not of equal cost" not in plain.out and "no interval" not in plain.out
    assert lines[0] == f"folder: 3 methods, 2 tasks, {2 * QUESTIONS} questions"


def test_many_tasks_stand_below_each_other(tmp_path: Path, cli: Callable[..., Any]) -> None:
    names = [f"benchmark_{number}" for number in range(9)]
    lmms(tmp_path / "a", "none", "", {name: draws(0, 0.9) for name in names})
    lmms(tmp_path / "b", "sparsevlm-v1.5", ",keep=0.25", {name: draws(1, 0.5) for name in names})
    out = cli("table", tmp_path).out
    assert out.count("sparsevlm-v1.5") >= 2 and all(name in out for name in names)
    assert all(len(line.rstrip()) <= 80 for line in out.split("score:")[0].splitlines()[1:])
    assert len(re.findall(r"\d\.\d \d+–\d+", out)) == len(names) + 1  # no column is squeezed
    assert out.count("score, relative %") == out.count("sparsevlm-v1.5")
    assert "not of equal cost: only budgets average and flops count all layers" in out


def test_sums_bars_and_equal_multiply_adds(runs: Path, cli: Callable[..., Any]) -> None:
    lmms(runs / "none", "none", "", {"mme|all": [1500.0, 40.0]}, date="20270101_000000")
    lmms(runs / "fastv", "fastv", ",average=0.5", {"mme|all": [1400.0, 40.0]}, date="20270101_000000")
    lmms(runs / "again", "fastv", ",average=0.25", {"gqa": draws(2, 0.6)})
    out = cli("table", runs, "--markdown").out
    assert "| mme\\|all |" in out and "| 770.0 |" in out and "| 720.0<br>93.5 " in out
    assert cli("table", runs).out.startswith("folder: 3 methods, 3 tasks, ")
    made = paper_table(read_runs([runs / "none", runs / "feather"]))
    assert not [line for line in notes(made) if "equal cost" in line]
    for kind, told in (("flops", False), ("final", True)):
        other = replace(made, rows=[made.rows[0], replace(made.rows[1], budget=f"{kind}: 0.5")])
        assert bool([line for line in notes(other) if "not of equal cost" in line]) is told


def test_scores_that_are_no_means_have_no_interval(runs: Path, cli: Callable[..., Any]) -> None:
    told = json.loads(cli("table", runs, "--json", "--metric", "gqa=f1").out)
    fastv = told["rows"][1]
    assert fastv["tasks"]["gqa"]["metric"] == "f1"
    assert fastv["tasks"]["gqa"]["relative"]["low"] is None and fastv["mean"]["low"] is None
    assert fastv["tasks"]["pope"]["relative"]["low"] == 1.0
    assert "no interval: the file has no score of each question" in cli("table", runs, "--metric", "gqa=f1").out


def test_a_later_run_counts_and_a_missing_task_is_told(runs: Path, cli: Callable[..., Any]) -> None:
    lmms(runs / "fastv", "fastv", ",average=0.5", {"gqa": [1.0] * QUESTIONS}, date="20270101_000000")
    lmms(runs / "vtw", "vtw", "", {"gqa": draws(4, 0.5)}, samples=False)
    told = {row["method"]: row for row in json.loads(cli("table", runs, "--json").out)["rows"]}
    assert told["fastv"]["tasks"]["gqa"]["score"] == 1.0 and told["fastv"]["tasks"]["pope"]["score"] < 1.0
    assert told["vtw"]["mean"] is None and "pope" not in told["vtw"]["tasks"]
    assert told["vtw"]["tasks"]["gqa"]["relative"]["low"] is None
    assert "own counts" in cli("table", runs).out


def test_groups_stand_for_their_subtasks_and_other_models_can_be_the_reference(tmp_path: Path) -> None:
    lmms(tmp_path / "a", "none", "", {"mmbench": [1.0], "mmbench_en": [1.0], "pope": [1.0]})
    file = next((tmp_path / "a").glob("*_results.json"))
    told = json.loads(file.read_text())
    told["group_subtasks"] = {"mmbench": ["mmbench_en"], "pope": []}
    told["config"]["model"] = "llava_hf"
    file.write_text(json.dumps(told))
    (run,) = read_runs([tmp_path])
    assert list(run.tasks) == ["mmbench", "pope"] and (run.method, run.untouched) == ("llava_hf", False)
    assert paper_table([run], untouched="llava_hf").rows[0].untouched


def test_our_own_results_and_their_pictures(tmp_path: Path, cli: Callable[..., Any]) -> None:
    asked = ("fastv", "--average", 0.5, "--scenes", 3, "--task", "colour", "--task", "counting", "--seeds", 1)
    told = json.loads(cli("eval", *asked, "--json").out)
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(told))
    made = paper_table(read_runs([file]))
    assert [row.method for row in made.rows] == [row["condition"] for row in told["rows"]]
    for row, own in zip(made.rows, told["rows"], strict=True):
        for task in told["tasks"]:
            assert row.tasks[task].score == pytest.approx(own["tasks"][task]["accuracy"]["value"])
        assert row.average == own["average"] / own["total"] and row.flops_share == own["flops_share"]
    scores = runs_of_colour(file)
    assert len(set(scores.pictures.values())) == 3 == len(set(told["samples"]["picture"]))
    of = [number for number, task in enumerate(told["samples"]["task"]) if task == "colour"]
    assert list(scores.pictures.values()) == [told["samples"]["picture"][number] for number in of]
    assert list(scores.each.values()) == [told["samples"]["scores"][0][number] for number in of]
    del told["samples"]  # a file of version 0.1
    file.write_text(json.dumps(told))
    assert all(row.mean is None or row.mean.low is None for row in paper_table(read_runs([file])).rows)


def test_what_a_file_of_lmms_eval_says(tmp_path: Path) -> None:
    """Metrics, repeats, models of other classes, scores that are no numbers: each as the file has it."""
    lmms(tmp_path, "none", ",keep=0.5", {"gqa": [1.0, 0.0]})
    (file,) = tmp_path.glob("*_results.json")
    told = json.loads(file.read_text())
    (run,) = read_runs([file])
    assert (run.untouched, run.budget) == (True, "")  # nothing is dropped, whatever the budget
    assert [score.metric for score in run.tasks["gqa"]] == ["exact_match", "f1"]
    told["results"]["gqa"] |= {"odd,none": float("nan")}
    told["group_subtasks"] = {"all": ["gqa"]}  # a group without a score of its own hides nothing
    told["config"] = {"model": "llava_hf", "model_args": {"model": "a", "keep": 0.25}}
    told["higher_is_better"] = {"gqa": {"f1": False}}
    file.write_text(json.dumps(told))
    lines = [{"doc_id": number, "input": "?", "target": "x"} for number in (0, 0, 1)]  # one question was asked twice
    samples = next(tmp_path.glob("*_samples_gqa.jsonl"))

    def scored(*scores: object) -> Any:
        samples.write_text(
            "".join(json.dumps({**one, "exact_match": s}) + "\n" for one, s in zip(lines, scores, strict=True))
        )
        (run,) = read_runs([tmp_path])
        return run

    run = scored(True, False, 0.5)
    assert (run.model, run.method, run.budget, run.untouched) == ("a", "llava_hf", "keep: 0.25", False)
    first, second = run.tasks["gqa"]
    assert (first.higher_is_better, second.higher_is_better) == (True, False)
    assert sorted(first.each.values()) == [0.5, 0.5]  # alike in words, not the same question
    for odd in ("yes", None, {"a": 1}):
        assert scored(True, False, odd).tasks["gqa"][0].each is None
    (tmp_path / "odd.json").write_text("no results, and nobody named it")
    assert len(read_runs([tmp_path])) == 1


def test_intervals_are_of_95_per_cent_and_tasks_are_drawn_apart(tmp_path: Path) -> None:
    scores = draws(5, 0.6)
    share = float(np.mean(scores))
    lmms(tmp_path / "a", "none", "", {name: [1.0] * QUESTIONS for name in ("gqa", "pope")})
    lmms(tmp_path / "b", "fastv", "", {"gqa": scores, "pope": scores})
    row = paper_table(read_runs([tmp_path])).rows[1]
    spread = (share * (1 - share) / QUESTIONS) ** 0.5

    def width(estimate: Any) -> float:
        return float(estimate.high - estimate.low)

    assert width(row.tasks["gqa"].relative) == pytest.approx(2 * 1.96 * spread, rel=0.12)
    # Two tasks of the same scores are no copies of each other: their mean is known better by the root of two.
    assert width(row.mean) == pytest.approx(2 * 1.96 * spread / 2**0.5, rel=0.12)


def test_hardly_any_right_answer_and_scores_of_which_less_is_better(tmp_path: Path) -> None:
    lmms(tmp_path / "a", "none", "", {"gqa": [1.0] + [0.0] * (QUESTIONS - 1), "pope": draws(1, 0.8)})
    lmms(tmp_path / "b", "fastv", "", {"gqa": [1.0] * 2 + [0.0] * (QUESTIONS - 2), "pope": draws(2, 0.8)})
    for file in tmp_path.glob("*/*_results.json"):
        told = json.loads(file.read_text())
        told["higher_is_better"]["pope"]["exact_match"] = False
        file.write_text(json.dumps(told))
    row = paper_table(read_runs([tmp_path])).rows[1]
    rare = row.tasks["gqa"].relative
    assert rare is not None and rare.value == 2.0 and rare.low is not None and rare.high is not None
    assert np.isfinite([rare.low, rare.high]).all()
    assert row.tasks["pope"].relative is None and row.mean is None


def test_budgets_stand_together_and_questions_must_be_the_same(tmp_path: Path) -> None:
    scores = {"gqa": draws(0, 0.9)}
    lmms(tmp_path / "a", "none", "", scores)
    for number, (recipe, share) in enumerate([("fastv", 0.5), ("fastv", 0.25), ("feather", 0.5)]):
        lmms(tmp_path / f"b{number}", recipe, f",average={share}", scores)
    made = paper_table(read_runs([tmp_path]))
    assert [(row.method, row.budget[-4:]) for row in made.rows[1:]] == [
        ("fastv", " 0.5"),
        ("feather", " 0.5"),
        ("fastv", "0.25"),
    ]
    with pytest.raises(InputError, match="several of the untouched model"):
        paper_table(read_runs([tmp_path / "b0", tmp_path / "b1"]), untouched="fastv")
    lmms(tmp_path / "fewer", "vtw", "", {"gqa": draws(0, 0.9)[:-1]}, samples=False)
    lmms(tmp_path / "other", "vtw", "", scores)
    file = next((tmp_path / "other").glob("*_samples_gqa.jsonl"))
    file.write_text(file.read_text().replace("question 7", "question seven"))
    for name in ("fewer", "other"):
        with pytest.raises(InputError, match="gqa: other questions than the untouched model was asked"):
            paper_table(read_runs([tmp_path / "a", tmp_path / name]))


def runs_of_colour(file: Path) -> Any:
    return read_runs([file])[0].tasks["colour"][0]


def wrong(folder: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    """Mistakes, and what is said about them."""
    return {
        "missing": ((folder / "no",), "no such file or folder"),
        "nothing": ((), "give result files or folders"),
        "empty": ((folder / "empty",), "no results in it"),
        "other": ((folder / "other.json",), "neither results of lmms-eval nor of `tokenprune eval --json`"),
        "text": ((folder / "text.json",), "no JSON"),
        "broken": ((folder / "broken.json",), "not as lmms-eval writes it: KeyError 'model'"),
        "list": ((folder / "list.json",), "not as lmms-eval writes it: AttributeError"),
        "untouched": ((folder / "fastv",), "no results of the untouched model: run with recipe=none"),
        "name": ((folder / "fastv", "--untouched", "fastw"), "(did you mean 'fastv'?)"),
        "models": ((folder / "none", folder / "second"), "results of 2 models: folder, other"),
        "metric": ((folder / "none", "--metric", "gqa=exact_matc"), "(did you mean 'exact_match'?)"),
        "task": ((folder / "none", "--metric", "gqb=f1"), "no results of task 'gqb' (did you mean 'gqa'?)"),
        "pair": ((folder / "none", "--metric", "f1"), "expected TASK=NAME"),
        "no task": ((folder / "none", "--metric", "=f1"), "expected TASK=NAME"),
        "both": ((folder / "none", "--markdown", "--json"), "give one of them"),
        "questions": ((folder / "none", folder / "fewer"), "gqa: other questions than the untouched model was asked"),
        "named": ((folder / "none", folder / "renamed"), "has the metric acc, the untouched model's exact_match"),
    }


@pytest.mark.parametrize("mistake", wrong(Path()))
def test_mistakes_are_told_in_a_line(mistake: str, runs: Path, cli: Callable[..., Any]) -> None:
    (runs / "empty").mkdir()
    (runs / "other.json").write_text("{}")
    (runs / "text.json").write_text("text")
    (runs / "broken.json").write_text('{"results": {"a": 1}, "configs": 0, "higher_is_better": 0, "config": {}}')
    told = {"results": {"a": 1}, "configs": 0, "higher_is_better": {}, "config": {"model": "x"}}
    (runs / "list.json").write_text(json.dumps(told))
    lmms(runs / "second", "fastv", "", {"gqa": draws(0, 0.9)}, model="other")
    lmms(runs / "fewer", "fastv", "", {"gqa": draws(0, 0.9)[:-1]})
    lmms(runs / "renamed", "fastv", "", {"gqa": draws(0, 0.9)}, metric="acc")
    words, message = wrong(runs)[mistake]
    done = cli("table", *words)
    assert done.status == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err
