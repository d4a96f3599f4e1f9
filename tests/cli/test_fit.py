"""`tokenprune fit`: what it writes, what it reads, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_command_writes_what_it_says(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = cli("fit", "text-conditioned", "--output", out, "--scenes", 4, "--steps", 2, "--batch", 2, "--json")
    facts = json.loads(told.out)
    assert told.status == 0
    assert all(Path(path).is_file() for path in [facts["recipe"], facts["plot"], *facts["weights"]])
    assert facts["steps"] == 2
    assert cli("show", facts["recipe"]).status == 0


def test_the_command_reads_a_folder_of_pictures(cli: Callable[..., Any], tmp_path: Path, picture: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.png").write_bytes(picture.read_bytes())
    asked = tmp_path / "asked.txt"
    asked.write_text("what is this ?\n\nwhere is it ?\n")
    out = tmp_path / "run"
    arguments = ["fit", "text-conditioned", "--data", photos, "--output", out, "--steps", 1, "--batch", 2]
    assert cli(*arguments, "--questions", asked).status == 0
    told = cli(*arguments)
    assert (told.status, "needs --questions" in told.err) == (2, True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "0.png", "question": "what ?"}\n{"image": "9.png", "question": "what ?"}\n')
    told = cli(*arguments, "--questions", rows)
    assert told.status == 2 and "rows.jsonl:2: error: no picture 9.png" in told.err
    rows.write_text('{"image": "0.png", "question": " "}\n{"image": "1.png", "question": "what ?"}\n')
    told = cli(*arguments, "--questions", rows)
    assert told.status == 2 and "rows.jsonl:1: error: the question is empty" in told.err
    told = cli(*arguments, "--questions", tmp_path / "none.txt")
    assert (told.status, told.err) == (
        2,
        f"error: --questions: cannot read {tmp_path / 'none.txt'}: No such file or directory\n",
    )


def test_a_learned_part_of_ones_own_is_fitted_and_used(cli: Callable[..., Any], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "learned.md").read_text(encoding="utf-8")
    part = next(block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "class Probe" in block)
    (tmp_path / "probe.py").write_text(part)
    recipe = tmp_path / "probe.yaml"
    recipe.write_text("version: 1\nname: probe\nbudget: {keep: 0.25}\nstages: [{place: after_vision, scorer: probe}]\n")
    plugin, out = ("--plugin", tmp_path / "probe.py"), tmp_path / "run"
    told = cli("fit", recipe, *plugin, "--output", out, "--scenes", 2, "--steps", 1, "--batch", 2, "--json")
    assert (told.status, told.err) == (0, "")
    written = json.loads(told.out)["recipe"]
    assert cli("check", written, *plugin).status == 0
    again = cli("fit", recipe, *plugin, "--output", out, "--scenes", 2, "--steps", 1, "--batch", 2)
    assert f"next: tokenprune eval {written} random uniform --plugin {plugin[1]} --keep 0.25" in again.out
    assert cli("fit", recipe, "--output", out, "--scenes", 2).status == 2, "nobody knows the part without its file"
