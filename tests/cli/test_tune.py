"""`tokenprune tune` on the embedded model's scenes, and on a question file with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokenprune as tp

SMALL = ("--scenes", 2, "--task", "colour", "--seeds", 1, "--average", 0.4)
CHOOSE = ("--choose", "stages.0.scorer=norm,attention", "--choose", "stages.0.sampler=top_k,max_min")


def test_table_file_picture_and_json_tell_the_same(cli: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    outcome = cli("tune", "fastv", *SMALL, *CHOOSE, "--trials", 4, "--output", folder)
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    notes = next(number for number, line in enumerate(lines) if line.startswith("95 %: intervals"))
    assert notes > 10 and all(len(line.rstrip()) <= 80 for line in [*lines[:notes], lines[-1]])
    winner = folder / "winner.yaml"
    assert lines[-2] == f"winner: {winner}"
    Image.open(folder / "pareto.png").load()
    again = cli("tune", "fastv", *SMALL, *CHOOSE, "--trials", 4, "--output", folder, "--json")
    assert (again.status, again.err) == (0, "")
    told = json.loads(again.out)
    assert told["winner_file"] == str(winner) and tp.load_recipe(winner).to_dict() == told["winner"]["recipe"]
    tuned = next(row for row in told["report"]["rows"] if row["condition"] == "tuned")
    assert lines[-1].startswith(f"{100 * tuned['accuracy']['value']:.1f} % right at {tuned['flops_share']:.0%} of the")
    assert {each["second"] for each in told["versus"]} >= {"random", "uniform", "smaller-image"}
    other = cli("tune", "fastv", *SMALL, *CHOOSE[:2], "--trials", 2, "--seed", 1, "--output", folder)
    assert other.status == 0 and "another search's; it is replaced" in other.err


def test_own_questions_without_answers(cli: Callable[..., Any], tmp_path: Path, llava_folder: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    for name, size in {"a": (112, 84), "b": (84, 84)}.items():
        Image.linear_gradient("L").resize(size).convert("RGB").save(album / f"{name}.png")
    rows = [{"image": f"{name}.png", "question": "where is the cat ?"} for name in "ab"]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--model", llava_folder, "--images", album, "--questions", tmp_path / "q.jsonl", "--agree")
    options = ("--average", 0.75, "--max-new-tokens", 2, "--seeds", 1, "--output", tmp_path / "o")
    outcome = cli("tune", "divprune", *asked, *options, "--choose", "stages.0.sampler=max_min,uniform")
    assert outcome.status == 0, outcome.err
    assert "the same at" in " ".join(outcome.out.partition("winner: ")[2].split()) and "same %" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fastv", "--average", 0.4), "nothing to choose; give for example --choose"),
        (("fastv", *CHOOSE), "give one of --average and --flops"),
        (("fastv", *CHOOSE, "--average", 0.4, "--flops", 0.4), "give one of --average and --flops"),
        ((*CHOOSE, "--average", 0.4), "name one, such as"),
        (("fastv", "--space", "s.yaml", "--average", 0.4), "--space brings its own recipe"),
        (("--space", "s.yaml", "--average", 0.4), "no such file"),
        (("fastv", "--average", 0.4, "--choose", "stages.0.scorrer=norm"), "(did you mean 'scorer'?)"),
        (("fastv", "--average", 0.4, "--choose", "stages.0.scorer=["), "--choose:1:"),
    ],
)
def test_mistakes(cli: Callable[..., Any], tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    outcome = cli("tune", *words, "--output", tmp_path / "o")
    assert outcome.status == 2 and message in outcome.err and not outcome.out
    assert not (tmp_path / "o").exists()
