"""ls, show, check, new, schema: what they print is right, and what one writes the other reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenprune.recipe import list_learned_recipes, list_loop_recipes, list_recipes, load_recipe, recipe_path
from tokenprune.registry import ROLES


def test_ls_has_every_recipe(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("ls", "--json").out)["recipes"]
    sections = {"methods": list_recipes(), "learned": list_learned_recipes(), "loops": list_loop_recipes()}
    for section, names in sections.items():
        assert [row["name"] for row in told if row["section"] == section] == names
    assert len(told) == sum(map(len, sections.values()))
    table = cli("ls").out
    assert table.index("fastv") < table.index("learned: ") < table.index("smarttrim") < table.index("loops: ")
    for row in told:
        assert row["name"] in table
        assert row["fingerprint"] == load_recipe(row["name"]).fingerprint


def test_ls_takes_a_pattern(cli: Callable[..., Any]) -> None:
    names = [row["name"] for row in json.loads(cli("ls", "sparsevlm-v*", "--json").out)["recipes"]]
    assert names == [name for name in list_recipes() if name.startswith("sparsevlm-v")]
    parts = json.loads(cli("ls", "parts", "rank*", "--json").out)["parts"]
    assert [(part["role"], part["name"]) for part in parts] == [("scheduler", "rank_ratio")]


def test_ls_parts_and_models(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("ls", "--parts", "--json").out)["parts"]
    assert {part["role"] for part in told} == set(ROLES)
    assert all(part["summary"] for part in told)
    assert all(argument["help"] for part in told for argument in part["args"])
    assert "rank_ratio" in cli("ls", "parts").out
    models = [row["name"] for row in json.loads(cli("ls", "models", "--json").out)["models"]]
    assert {"llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"} <= set(models)
    assert "Qwen2.5-VL" in cli("ls", "models").out


def test_show_tells_of_weights_and_of_asking_again(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("show", "smarttrim", "--json").out)
    assert list(told["weights"]) == ["first.scorer", "second.scorer"]
    without = cli("show", "smarttrim", "--set", "stages.first.scorer.weights=null").out
    assert "tokenprune fit smarttrim --model" in " ".join(without.split())
    loop = cli("show", "visionthink", "--json")
    assert (loop.status, json.loads(loop.out)["again"]["pixels"]) == (0, 0.25)
    assert "counts below are of the first pass" in " ".join(cli("show", "visionthink").out.split())


def test_show_gives_the_published_counts(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("show", "sparsevlm-v1.5", "--variant", "192", "--json").out)
    assert [stage["tokens"] for stage in told["stages"]] == [309, 204, 113]
    assert [stage["layer"] for stage in told["stages"]] == [3, 7, 16]
    assert told["vision_tokens"] == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16
    assert told["average"] == sum(told["vision_tokens"]) / 32
    assert told["exact"]


def test_show_scales_to_other_shapes(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("show", "fastv", "--keep", "0.25", "--grid", "20x30", "--layers", "16", "--json").out)
    assert (told["total"], told["grid"], told["final"]) == (600, [1, 20, 30], 150)
    assert told["vision_tokens"] == [600] + [150] * 15
    assert told["keep"] == 150


def test_show_explains_every_argument_once(cli: Callable[..., Any]) -> None:
    out = cli("show", "sparsevlm").out
    assert out.count("rank_ratio  ") == 1  # three stages, one explanation
    assert "0.52, 0.28, 0.16" in out
    for word in ("per_cluster", "at_least", "distance_scale", "fingerprint", "≈"):
        assert word in out
    assert "≈" not in cli("show", "sparsevlm", "--keep", "64").out


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", list_recipes())
def test_show_works_for_every_recipe_and_its_yaml_passes_check(
    name: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    shown = cli("show", name)
    assert (shown.status, shown.err) == (0, "")
    path = tmp_path / "resolved.yaml"
    path.write_text(cli("show", name, "--yaml").out, encoding="utf-8")
    checked = cli("check", path)
    assert (checked.status, checked.err) == (0, "")
    assert load_recipe(path) == load_recipe(name)


def test_yaml_has_the_changes(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "changed.yaml"
    path.write_text(cli("show", "fastv", "--final", "64", "--set", "stages.0.scorer.rope=false", "--yaml").out)
    assert load_recipe(path) == load_recipe("fastv", final=64, sets=["stages.0.scorer.rope=false"])


def test_check_tells_fingerprints_and_all_problems(tmp_path: Path, cli: Callable[..., Any]) -> None:
    good, bad = recipe_path("fastv"), tmp_path / "bad.yaml"
    bad.write_text("version: 1\nstages:\n  - place: after_vison\n    smapler: top_k\n")
    fine = cli("check", good)
    assert (fine.status, fine.err) == (0, "")
    assert fine.out.startswith(f"{good}: ok, fastv {load_recipe('fastv').fingerprint}, variants k2-r75, ")

    both = cli("check", good, bad)
    assert (both.status, both.out) == (2, fine.out)
    assert f"{bad}:3:12: error: " in both.err
    assert "did you mean 'after_vision'?" in both.err
    assert f"{bad}:4:5: error: unknown key 'smapler'" in both.err
    assert both.err.endswith("2 problems in 1 of 2 files\n")


def test_check_speaks_to_machines(tmp_path: Path, cli: Callable[..., Any]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 2\n")
    told = cli("check", bad, "--json")
    (problem,) = json.loads(told.out)["files"][0]["problems"]
    assert (told.status, told.err, problem["line"], problem["column"]) == (2, "", 1, 10)
    assert json.loads(told.out)["ok"] is False
    github = cli("check", bad, "--format", "github")
    assert (github.status, github.err) == (2, "")
    assert github.out.startswith(f"::error file={bad},line=1,col=10::")
    assert json.loads(cli("check", recipe_path("none"), "--json").out)["ok"] is True


def test_check_of_missing_files_and_folders(tmp_path: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("check", tmp_path / "none.yaml", tmp_path)
    assert outcome.status == 2
    assert f"{tmp_path / 'none.yaml'}: error: no such file" in outcome.err
    assert f"{tmp_path}: error: this is a folder" in outcome.err


def test_new_recipe_passes_check(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "My first.yaml"
    made = cli("new", path)
    assert (made.status, made.out) == (0, "")
    assert cli("check", path).out.startswith(f"{path}: ok, my-first ")
    assert cli("show", path).status == 0
    assert path.read_text().replace(str(path), "FILE").replace("my-first", "my-recipe") == cli("new").out


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", list_recipes())
def test_new_from_a_recipe_keeps_its_comments_and_meaning(name: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "mine.yaml"
    assert cli("new", "--from", name, path).status == 0
    assert cli("check", path).status == 0
    assert load_recipe(path).name == "mine"
    assert load_recipe(path).fingerprint == load_recipe(name).fingerprint
    assert path.read_text(encoding="utf-8").count("#") > recipe_path(name).read_text(encoding="utf-8").count("#") - 1


def test_new_overwrites_only_when_told(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    assert cli("new", path).status == 2
    assert path.read_text() == "precious"
    assert cli("new", path, "--force").status == 0
    assert "precious" not in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_schema(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "schema.json"
    assert cli("schema", "--output", path).out == ""
    assert path.read_text(encoding="utf-8") == cli("schema").out
    assert "$schema" in json.loads(path.read_text(encoding="utf-8"))


def test_no_command_shows_help(cli: Callable[..., Any]) -> None:
    assert cli().out == cli("--help").out
    assert cli("--version").out.startswith("tokenprune ")


def test_show_proposes_only_what_is_not_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "tower.yaml"
    path.write_text("version: 1\nbudget: {flops: 0.5}\nstages:\n  - {place: {in_vision: {block: 1}}, scorer: norm}\n")
    for command in (("show", path), ("run", "--recipe", path), ("flops", path)):
        told = cli(*command)
        assert told.status == 2 and "tokenprune run" not in told.out
        assert "expected keep, such as keep: 0.25 (tokenprune flops" in told.err
    out = cli("show", "tome", "--keep", "0.5").out
    assert "next: tokenprune run --recipe tome --keep 0.5; " in out and "in vision: block 11/12  " in out
    ran = cli("run", "--recipe", "tome", "--max-new-tokens", 2).out
    assert "in vision: block 11/12  " in ran and "after vision" not in ran and "layer 0" not in out + ran
    assert "next: tokenprune run --recipe fastv; " in cli("show", "fastv").out
    told = cli("show", "fastv", "--variant", "k2-r75", "--set", "stages.0.scheduler.keep= 10").out.splitlines()[-1]
    more = "--variant k2-r75 --set 'stages.0.scheduler.keep= 10'"
    assert told == f"next: tokenprune run --recipe fastv {more}; tokenprune show fastv {more} --yaml"
    assert "--recipe fastv --keep 0.25; " in cli("show", "fastv", "--keep", "25%").out
