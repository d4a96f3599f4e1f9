"""`tokenprune run --images --ray`: what a worker does, and, where Ray is installed, a whole run."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokenprune.cli.many import Work
from tokenprune.cli.picture_list import read_lines
from tokenprune.errors import InputError
from tokenprune.study.many import Alone, OnRay
from tokenprune.study.many.on_ray import _facts, _Worker

QUESTION = "is there a red ring ?"
WORK = Work("embedded", None, None, "sdpa", "fastv", {"keep": 0.25}, (), 8)


def test_a_worker_answers_as_one_process_and_only_about_the_same_files(album: Path) -> None:
    lines = read_lines([str(album)], QUESTION)
    alone = Alone(WORK)
    ((_, expected),) = alone.answers([(lines, False)])
    assert _facts(WORK) == ((alone.run, alone.facts), None)
    worker = _Worker(WORK, alone.run)

    def told(asked: list[Any]) -> Any:
        row = worker({"number": 3, "batch": pickle.dumps((asked, False))})
        assert row["number"] == 3
        return pickle.loads(row["done"])

    done, refused = told(lines)
    assert (done.told, refused) == (expected.told, None)
    changed = replace(lines[0], digest="0" * 16)
    assert told([changed]) == (None, f"{lines[0].path} is another file where a worker runs, or has changed since")
    gone = replace(lines[0], path=album / "7.png")
    assert told([gone])[1].startswith(f"{album / '7.png'} cannot be read by a worker (No such file or directory); are")
    other = _Worker(WORK, "0" * 12)({"number": 0, "batch": pickle.dumps((lines, False))})
    assert pickle.loads(other["done"]) == (None, "the workers do not run the same model: did its files change?")


def test_what_cannot_be_loaded_is_told_and_names_are_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, refused = _facts(replace(WORK, model="nowhere"))
    assert told is None and refused is not None and "no such model folder: nowhere" in refused
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    whole = replace(WORK, recipe="my.yaml", plugins=(Path("my.py"),)).anywhere()
    assert (whole.model, whole.recipe) == ("embedded", str(tmp_path / "my.yaml"))
    assert whole.plugins == (tmp_path / "my.py",)


def test_mistakes(album: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--ray goes with --images" in cli("run", "--ray", "auto").err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray: pip install 'tokenprune-vlm\[ray\]'"):
        OnRay(WORK, "local", 1)


@pytest.mark.slow
def test_a_cluster_writes_the_same_bytes(album: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    pytest.importorskip("ray")
    asked = ("run", "--images", album, "--question", QUESTION, "--batch-size", 1, "--measure", 0, "--json")
    budget = ("--recipe", "fastv", "--keep", 0.25, "--max-new-tokens", 8)
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    assert cli(*asked, *budget, "--output", one).status == 0
    ran = cli(*asked, *budget, "--output", many, "--ray", "local", "--workers", 2)
    assert ran.status == 0 and json.loads(ran.out)["ray"] == "local"
    assert many.read_bytes() == one.read_bytes()
    many.write_bytes(b"".join(one.read_bytes().splitlines(keepends=True)[1:2]))
    ran = cli(*asked, *budget, "--output", many, "--ray", "local", "--workers", 1)
    assert json.loads(ran.out)["answered_before"] == 1 and many.read_bytes() == one.read_bytes()
    ran = cli(*asked, *budget, "--output", tmp_path / "no.jsonl", "--ray", "127.0.0.1:1", "--workers", 1)
    assert ran.status == 2 and "--ray 127.0.0.1:1: no cluster" in ran.err
