"""`tokenprune eval` on the embedded model's scenes, and on question files with tiny random models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from tokenprune.cli import terminal
from tokenprune.cli.question_file import read_cases
from tokenprune.errors import InputError
from tokenprune.scenes import TASKS
from tokenprune.study.evaluate import (
    UNTOUCHED,
    Case,
    Condition,
    Evaluation,
    Outcome,
    agreement,
    normal,
    wilson,
)

SMALL = ("--scenes", 3, "--task", "colour", "--task", "ground", "--seeds", 2)


def told(outcome: Any) -> dict[str, Any]:
    """The one JSON object on stdout of a run without complaints."""
    assert (outcome.status, outcome.err) == (0, "")
    return json.loads(outcome.out)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder with two pictures of different size."""
    folder = tmp_path / "album"
    folder.mkdir()
    Image.linear_gradient("L").resize((112, 84)).convert("RGB").save(folder / "a.png")
    Image.linear_gradient("L").resize((84, 84)).convert("RGB").save(folder / "b.png")
    return folder


def questions(folder: Path, *lines: object, name: str = "questions.jsonl") -> Path:
    """A question file of these lines; dicts become JSON."""
    file = folder / name
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def test_table_csv_and_picture_tell_the_same(cli: Callable[..., Any], tmp_path: Path) -> None:
    files = {"--csv": tmp_path / "e.csv", "--save-plot": tmp_path / "e.png", "--output": tmp_path / "runs"}
    options = [part for pair in files.items() for part in pair]
    outcome = cli("eval", "fastv", *SMALL, "--keep", "0.5", "0.125", *options)
    assert (outcome.status, outcome.err) == (0, "")
    for words in (
        "keep: 0.5",
        "keep: 0.125",
        "smaller-image",
        "only 3 pictures",
        "random of 2",
        "uniform of 4",
        "vs untouched",
        "p, Holm",
        "adjusted for the 8 pairs",
        "saves no FLOPs",
    ):
        assert words in " ".join(outcome.out.split())
    with files["--csv"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == (1 + 2 * 5) * 3  # overall and two tasks each
    facts = told(cli("eval", "fastv", *SMALL, "--keep", "0.5,0.125", "--output", files["--output"], "--json"))
    for row in facts["rows"]:
        of = [line for line in lines if (line["condition"], line["budget"]) == (row["condition"], row["budget"])]
        assert float(of[0]["accuracy"]) == row["accuracy"]["value"]
        assert float(of[0]["difference_low"]) == row["difference"]["low"]
        assert (float(of[0]["flops"]), float(of[0]["flops_share"])) == (row["flops"], row["flops_share"])
        assert f" {row['flops_share']:.0%} " in outcome.out
        assert float(of[0]["method_seconds"]) == row["method_seconds"]  # from the folder: nothing ran again
        shown = f"{100 * row['accuracy']['value']:.1f}"
        assert any(line.startswith(row["condition"]) and shown in line for line in outcome.out.splitlines())
    with Image.open(files["--save-plot"]) as picture:
        assert picture.width > picture.height
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.csv", "e.png", "runs"]


def test_average_is_equal_cost_for_all(cli: Callable[..., Any]) -> None:
    facts = told(cli("eval", "fastv", "feather", *SMALL, "--average", "0.5", "--json"))
    rows = {row["condition"]: row for row in facts["rows"]}
    assert list(facts["rows"][0])[:3] == ["condition", "budget", "baseline"]
    assert set(rows) == {"untouched", "fastv", "feather", "random", "uniform", "last", "smaller-image"}
    assert rows.pop("untouched")["average"] == 144
    assert all(68 <= row["average"] <= 72 for row in rows.values())
    assert (rows["random"]["draws"], rows["uniform"]["draws"], rows["fastv"]["draws"]) == (2, 4, 1)
    assert rows["fastv"]["flops_share"] < 1 == rows["smaller-image"]["flops_share"]  # it is scaled up again
    assert all(0 <= pair["p"] <= pair["p_holm"] <= 1 for pair in facts["pairs"])
    pairs = {frozenset((pair["first"], pair["second"])) for pair in facts["pairs"]}
    assert frozenset(("fastv", "feather")) in pairs and frozenset(("random", "last")) not in pairs
    assert len(pairs) == len(facts["pairs"]) == 1 + 2 * 4
    values = [row["accuracy"]["value"] for row in facts["rows"][1:]]
    assert values == sorted(values, reverse=True)


def test_overrides_difficulty_and_what_the_plot_is_over(cli: Callable[..., Any], tmp_path: Path) -> None:
    """One scene; --set reaches the recipe and no baseline, and the plot over FLOPs is another one."""
    kept = ("--keep", "0.5", "--scenes", 1, "--task", "shape", "--seeds", 1, "--output", tmp_path / "runs")
    plain = told(cli("eval", "fastv", *kept, "--json", "--save-plot", tmp_path / "tokens.png"))
    changed = ("--set", "stages.0.scorer.rope=false")
    facts = told(cli("eval", "fastv", *kept, "--json", *changed, "--cost", "flops", "--save-plot", tmp_path / "f.png"))
    before, after = ({row["condition"]: row["fingerprint"] for row in each["rows"]} for each in (plain, facts))
    assert [name for name in before if before[name] != after[name]] == ["fastv"]
    assert (tmp_path / "tokens.png").read_bytes() != (tmp_path / "f.png").read_bytes()
    outcome = cli("eval", "fastv", *kept, "--difficulty", "--no-pairs")
    ((name, number),) = facts["tasks"]["shape"]["difficulties"].items()
    assert number == 1 and "shape, right %" in outcome.out and name in outcome.out
    assert "Holm" not in outcome.out


def test_without_a_budget_recipes_run_alone(cli: Callable[..., Any]) -> None:
    outcome = cli("eval", "fastv", *SMALL, "--json")
    assert outcome.status == 0 and "recipes run at their own costs" in outcome.err
    assert [row["condition"] for row in json.loads(outcome.out)["rows"]] == ["untouched", "fastv"]


def test_own_questions_and_another_model(
    cli: Callable[..., Any], album: Path, tmp_path: Path, qwen_folder: Path
) -> None:
    """Qwen2-VL sees a smaller picture with fewer tokens: those are counted, not worked out."""
    file = questions(
        tmp_path,
        {"image": "a.png", "question": "where is the cat?", "answer": "left", "task": "place", "difficulty": "easy"},
        "",
        {"image": "b.png", "question": "where is the cat", "answer": 3},
    )
    options = ("--model", qwen_folder, "--images", album, "--questions", file, "--max-new-tokens", 2)
    facts = told(cli("eval", "fastv", "--keep", "0.5", "--seeds", 1, "--json", *options))
    assert facts["tasks"] == {
        "place": {"questions": 1, "ranked": False, "difficulties": {"easy": 1}},
        "all": {"questions": 1, "ranked": False, "difficulties": {}},
    }
    rows = {row["condition"]: row for row in facts["rows"]}
    assert rows["untouched"]["total"] == (4 * 3 + 3 * 3) / 2
    assert rows["smaller-image"]["average"] == (3 * 2 + 2 * 2) / 2
    assert rows["uniform"]["average"] == (6 + 4) / 2
    # A tower that takes any size saves there, too: less than any recipe needs, at about as many tokens.
    assert rows["smaller-image"]["flops"] < rows["uniform"]["flops"] < rows["untouched"]["flops"]
    one = told(cli("eval", "fastv", "--keep", "0.5", "--task", "place", "--json", *options))
    assert list(one["tasks"]) == ["place"]


def test_model_that_crops(cli: Callable[..., Any], album: Path, tmp_path: Path, llava_folder: Path) -> None:
    file = questions(tmp_path, "image,question,answer", 'a.png,"where is the cat?",left', name="q.csv")
    facts = told(cli("eval", "--final", "4", "--model", llava_folder, "--images", album, "--questions", file, "--json"))
    assert {row["condition"]: row["final"] for row in facts["rows"]}["last"] == 4


def test_all_bad_lines_are_told_at_once(cli: Callable[..., Any], album: Path, tmp_path: Path) -> None:
    (album / "broken.png").write_bytes((album / "a.png").read_bytes()[:60])
    good = {"image": "a.png", "question": "q", "answer": "yes"}
    file = questions(
        tmp_path,
        good,
        "{not json",
        "[1, 2]",
        {"image": "a.png", "question": "  "},
        {**good, "anwser": "x"},
        {**good, "image": "c.png"},
        {**good, "image": "broken.png", "question": "r"},
        good,
        {**good, "answer": ["yes"]},
    )
    outcome = cli("eval", "fastv", "--keep", 0.5, "--images", album, "--questions", file, "--output", tmp_path / "o")
    assert (outcome.status, outcome.out) == (2, "")
    lines = outcome.err.splitlines()
    wanted = [
        (2, "not JSON: "),
        (3, "expected an object in braces, got [1, 2]"),
        (4, "no question and no answer"),
        (5, "unknown field 'anwser' (did you mean 'answer'?)"),
        (6, "image: no such file: "),
        (7, "image: "),
        (8, "asks the same about a.png as line 1"),
        (9, "answer: expected text, got ['yes']"),
    ]
    assert len(lines) == len(wanted)
    for line, (number, message) in zip(lines, wanted, strict=True):
        assert line.startswith(f"{file}:{number}: error: {message}")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("packed", ["--packed", "--no-packed"])
def test_what_only_the_processor_knows_is_told_before_a_model_is_asked(
    packed: str, cli: Callable[..., Any], album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.study.evaluate.respondent.ask", lambda *_, **__: pytest.fail("asked"))
    good = {"image": "a.png", "question": "is there a red circle ?", "answer": "yes"}
    marked = [{**good, "question": f"what is {token} ?"} for token in ("<image>", "</s>", "<pad>")]
    file = questions(tmp_path, good, marked[0], "", *marked[1:])
    output = tmp_path / "o"
    outcome = cli("eval", "fastv", "--keep", 36, "--images", album, "--questions", file, "--output", output, packed)
    assert (outcome.status, outcome.out) == (2, "")
    assert [line for line in outcome.err.splitlines() if "error: " in line] == [
        f"{file}:2: error: the question contains '<image>', which this model takes for an image; reword it",
        f"{file}:4: error: the question contains '</s>', which this model takes for no text; reword it",
        f"{file}:5: error: the question contains '<pad>', which this model takes for no text; reword it",
    ]
    assert not output.exists()


def test_pictures_that_the_processor_refuses_are_told_by_line(
    cli: Callable[..., Any], album: Path, tmp_path: Path, qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.study.evaluate.respondent.ask", lambda *_, **__: pytest.fail("asked"))
    for name in ("long.png", "longer.png"):
        Image.new("L", (1200, 4)).save(album / name)
    rows = [{"image": name, "question": "where is the cat", "answer": "left"} for name in ("a.png", "long.png")]
    file = questions(tmp_path, *rows, {**rows[1], "image": "longer.png"})
    outcome = cli("eval", "fastv", "--keep", 4, "--images", album, "--questions", file, "--model", qwen_folder)
    assert (outcome.status, outcome.out) == (2, "")
    refused = "error: the model's processor refuses this input: absolute aspect ratio must be smaller than 200"
    lines = [line for line in outcome.err.splitlines() if "error: " in line]
    assert len(lines) == 2
    assert all(line.startswith(f"{file}:{number}: {refused}") for line, number in zip(lines, (2, 3), strict=True))


def test_csv_lines_are_counted_as_editors_do(album: Path, tmp_path: Path) -> None:
    file = questions(
        tmp_path, "image,question,answer", 'a.png,"two', 'lines",yes', "", "a.png,short", "b.png,q,", name="q.csv"
    )
    with pytest.raises(InputError) as caught:
        read_cases(file, album)
    assert str(caught.value).splitlines() == [
        f"{file}:5: error: 2 fields under 3 column names",
        f"{file}:6: error: no answer",
    ]
    with pytest.raises(InputError, match="the first line names the columns; no question and no answer"):
        read_cases(questions(tmp_path, "image,task", name="h.csv"), album)
    cases = read_cases(questions(tmp_path, "answer,image,question", "1,b.png,how many", name="g.csv"), album)
    assert [(c.question, c.answer, c.task, c.picture().size) for c in cases] == [("how many", "1", "all", (84, 84))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to compare: give a recipe, or a budget for the baselines"),
        (("fastv", "0.5"), "0.5 is no recipe; for a budget write --keep 0.5"),
        (("fastv", "--keep", "0.5", "--final", "9"), "only one of --keep, --average, --final and --flops"),
        (("fastv", "--keep", "1.5"), "--keep: keep as a share must lie in (0, 1], got 1.5"),
        (("fastv", "--keep", "0.5,"), "--keep: expected a count such as 64"),
        (("fastv", "--average", "0.05"), "fastv: budget average: 0.05: "),
        (("fastvv",), "did you mean"),
        (("fastv:k9",), "k9"),
        (("fastv", "--task", "color"), "got 'color' (did you mean 'colour'?)"),
        (("fastv", "--images", "."), "--images and --questions go together"),
        (("fastv", "--images", ".", "--questions", "none.jsonl"), "--questions: no such file: none.jsonl"),
        (("fastv", "--images", "nowhere", "--questions", "q.csv"), "--images: no such folder: nowhere"),
        (("fastv", "--images", ".", "--questions", "q.csv", "--scenes", "3"), "with --questions leave it out"),
        (("fastv", "--save-plot", "plot.pdf"), "expected a name that ends in .png, got plot.pdf"),
        (("fastv", "--csv", "nowhere/e.csv"), "--csv: no such folder: nowhere"),
        (("fastv", "--attention", "flash"), "--attention: expected sdpa or eager, got 'flash'"),
        (("fastv", "--cost", "flop"), "--cost: expected tokens or flops, got 'flop' (did you mean 'flops'?)"),
        (("fastv", "--set", "stages.0.scorer.ropes=1"), "did you mean 'rope'?"),
        (("fastv", "feather", "--set", "stages.0.scorer.gravty=1"), "fastv --set:1:17: error: unknown key"),
        (("fastv", "--output", "taken", "--scenes", "1"), "--output: cannot use taken"),
        (("fastv", "--seeds", "0"), "seeds"),
    ],
)
def test_mistakes_cost_nothing(
    arguments: tuple[str, ...],
    message: str,
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    outcome = cli("eval", *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_help_teaches(cli: Callable[..., Any]) -> None:
    out = cli("eval", "--help").out
    for words in ("--average", "paired", "85 %", "Examples:", "tokenprune eval fastv sparsevlm feather --keep 0.5"):
        assert words in out


def test_a_bar_learns_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval` knows the number of batches only when the first is done."""
    shown = StringIO()
    screen = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "console", lambda **_: screen)
    with terminal.counter("asking") as count:
        count(1, 3)
        count(1)
    assert "2/3" in shown.getvalue()


def test_agreement_needs_no_answers(llava_folder: Path, album: Path, cli: Callable[..., Any]) -> None:
    """By hand from the answers in the folder: how many are the untouched model's."""
    rows = [{"image": name, "question": question} for name in ("a.png", "b.png") for question in ("where ?", "the cat")]
    file = questions(album, *rows)
    where = ("--images", album, "--questions", file, "--model", llava_folder, "--device", "cpu")
    common = ("eval", "fastv", "--keep", "0.1", "--no-baselines", *where, "--output", album / "runs")
    assert "no answer" in cli(*common).err
    facts = told(cli(*common, "--agree", "--csv", album / "e.csv", "--json"))
    batches = [json.loads(line) for line in (album / "runs/results.jsonl").read_text().splitlines()]
    answers = {batch["condition"]: [normal(answer) for answer in batch["answers"]] for batch in batches}
    same = sum(one == other for one, other in zip(answers["untouched"], answers["fastv"], strict=True)) / len(rows)
    assert facts["measure"] == "agreement"
    assert [row["accuracy"]["value"] for row in facts["rows"]] == [1.0, same]
    lines = list(csv.DictReader((album / "e.csv").open()))
    assert float(lines[-1]["agreement"]) == same and "accuracy" not in lines[-1]
    shown = cli(*common, "--agree").out
    assert "same %" in shown and "vs untouched" not in shown and "those of the untouched model's" in shown


def test_agreement_counts_equal_words() -> None:
    cases = [Case(lambda: Image.new("RGB", (4, 4)), str(n), "?", "red") for n in range(4)]

    def outcome(condition: Condition, answers: list[str]) -> Outcome:
        right = [case.right(answer) for case, answer in zip(cases, answers, strict=True)]
        return Outcome(condition, answers, right, [9] * 4, [9.0] * 4, [9.0] * 4, [9] * 4, 0.0)

    said = [
        outcome(UNTOUCHED, ["red", "blue", "a ring", "no"]),
        outcome(Condition("x"), ["Red.", "red", "a  ring", "yes"]),
    ]
    before, after = Evaluation(cases, said), agreement(Evaluation(cases, said))
    assert [row.overall.value for row in before.rows] == [0.25, 0.5]
    assert [row.overall.value for row in after.rows] == [1.0, 0.5]
    assert after.rows[1].overall.ends == wilson(2, 4) and after.ranked == ("all",)


def test_tables_at_80_columns_break_no_word(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("eval", "fastv:k2-r75", "--keep", "0.5", "--scenes", 2, "--seeds", 1, "--no-pairs").out
    tables = out.partition("\ntokens: vision")[0].splitlines()
    assert max(map(len, tables)) <= 80
    for task in TASKS:
        assert sum(task in line for line in tables) == 1, task
    labels = {"untouched", "fastv:k2-r75", "random", "uniform", "last", "smaller-image"}
    assert {line.split(" ")[0] for line in tables} == {*labels, "embedded:", "right", "keep:", ""}


def test_a_recipe_may_leave_its_counts_to_the_budget(cli: Callable[..., Any], tmp_path: Path) -> None:
    """As the tutorial docs/your-own-sampler.md writes one: without a scheduler."""
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: mine\nstages:\n  - place: after_vision\n    scorer: norm\n    sampler: top_k\n")
    facts = told(cli("eval", file, *SMALL, "--average", "0.25", "0.5", "--no-baselines", "--json"))
    assert [row["final"] for row in facts["rows"]] == [144, 36, 72]
    assert "'solved' needs a budget" in cli("eval", file, *SMALL).err
