"""Every row of the table of bad recipes gives exactly its messages, and the report looks as it should."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from recipe.bad_recipes import BAD, FIXED, HEAD

from tokenprune.errors import RecipeError
from tokenprune.recipe import InvalidRecipeError, Problem, format_problems, load_recipe, parse_recipe
from tokenprune.registry import ROLES, parts


@pytest.mark.parametrize("name", BAD)
def test_message(name: str) -> None:
    text, expected = BAD[name]
    for role in ROLES:
        expected = [message.replace(f"<{role}>", ", ".join(parts(role))) for message in expected]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    problems = caught.value.problems
    assert [f"{p.line}:{p.column}: {p.message}" for p in problems] == expected


def test_report_shows_all_problems_with_source_line_and_caret(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "version: 1\n"
        "stages:\n"
        "  - place: {before_layer: -3}\n"
        "    scheduler: {type: rank_ratio, scael: 0.5, at_least: 0}\n"
        "    raters: last_text\n"
        "    recycler: clusters\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    allowed = "type, rule, scale, bias, energy, at_least, expected, rope, normalise, layer"
    assert str(caught.value) == (
        f"{path}:3:27: error: stages.0.place.before_layer: should be a layer from 0 to 9999, or a share of the depth "
        "between 0 and 1, such as 25% or 3/32 (got -3)\n"
        "     3 |   - place: {before_layer: -3}\n"
        "       |                           ^\n"
        f"{path}:4:35: error: unknown key 'scael' in stages.0.scheduler (did you mean 'scale'?); allowed: {allowed}\n"
        "     4 |     scheduler: {type: rank_ratio, scael: 0.5, at_least: 0}\n"
        "       |                                   ^\n"
        f"{path}:4:57: error: stages.0.scheduler.at_least: should be a whole number from 1 to 1000000 (got 0)\n"
        "     4 |     scheduler: {type: rank_ratio, scael: 0.5, at_least: 0}\n"
        "       |                                                         ^\n"
        f"{path}:6:15: error: stages.0.recycler: no such part 'clusters' (did you mean 'cluster'?); "
        f"known: {', '.join(parts('recycler'))}\n"
        "     6 |     recycler: clusters\n"
        "       |               ^"
    )


def test_reader_and_schema_complain_together() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HEAD + "name: a\nname: b\nbudget: {keep: 017}\nbudgt: 3\n")
    told = [(p.line, p.column) for p in caught.value.problems]
    assert told == [(3, 1), (4, 16), (5, 1)]


def test_dict_has_paths_instead_of_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"version": 1, "budget": {"keep": 2.5}, "stagse": [], "name": object(), "paper": float("nan")})
    assert str(caught.value) == (
        "<dict>: error: name: should be text, a number, true, false, null, a list or a mapping (got object)\n"
        "<dict>: error: paper: numbers must be finite (got nan)\n"
        "<dict>: error: budget.keep: should be a whole number from 1 to 1000000, or a number in (0, 1] (got 2.5)\n"
        "<dict>: error: unknown key 'stagse' in the recipe (did you mean 'stages'?); allowed: version, name, summary, "
        "paper, differences, budget, pictures, again, stages, variants, extends"
    )


def test_dict_that_contains_itself() -> None:
    data: dict[str, object] = {"version": 1}
    data["stages"] = [data]
    with pytest.raises(RecipeError, match="deeper than 64 levels"):
        load_recipe(data)


@pytest.mark.parametrize("key", [True, None, 1.5, (1, 2)])
def test_dict_keys_are_text(key: object) -> None:
    with pytest.raises(RecipeError, match=r"<dict>: error: the recipe: keys must be text"):
        load_recipe({"version": 1, key: 3})  # type: ignore[dict-item]


def test_long_lines_and_values_are_shortened() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HEAD + "name: " + "x" * 5000 + "\n")
    head, line, caret = str(caught.value).split("\n")
    assert len(head) < 200
    assert line.startswith("     2 | name: xxx")
    assert line.endswith("x…")
    assert len(line) < 160
    assert caret == "       | " + " " * 6 + "^"


def test_caret_far_to_the_right() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HEAD + "differences: [" + "a, " * 400 + "3]\n")
    _, line, caret = str(caught.value).split("\n")
    assert len(line) < 160
    assert line[caret.index("^")] == "3"


def test_caret_by_display_width() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe('version: 1\nbudget: {"宽e\u0301": 1}\n')
    assert str(caught.value).endswith('\n     2 | budget: {"宽e\u0301": 1}\n       |          ^')
    assert str(Problem("r", 1, 4, "m", "宽\té!")) == "r:1:4: error: m\n     1 | 宽\té!\n       |   \t ^"
    assert str(Problem("r", 1, 3, "m", "e\u0301!")).endswith("\n       |  ^")


def test_lines_end_where_the_parser_says_so() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe("version: 1\rsummary: a\x85# b\u2028  # c\r\nbugdet: 3\n")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column, problem.source_line) == (5, 1, "bugdet: 3")


def test_nothing_in_a_source_line_moves_the_cursor() -> None:
    shown = str(Problem("a\nb", 1, 1, "m", "\x1b[31m\u202eabc"))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert shown.startswith("a\ufffdb:1:1")


def test_formats() -> None:
    problems = [Problem("a,b:c.yaml", 3, 4, "50% wrong\nhere: now", "x: y"), Problem("d", None, None, "gone")]
    assert format_problems(problems, "github") == (
        "::error file=a%2Cb%3Ac.yaml,line=3,col=4::50%25 wrong%0Ahere: now\n::error file=d::gone"
    )
    assert json.loads(format_problems(problems, "json"))[0] == {
        "path": "a,b:c.yaml",
        "line": 3,
        "column": 4,
        "message": "50% wrong\nhere: now",
        "source_line": "x: y",
    }


def test_error_survives_pickling() -> None:
    error = InvalidRecipeError([Problem("r", 1, 1, "m", "x")])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_encodings(tmp_path: Path) -> None:
    text = FIXED.replace("\n", "\r\n")
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_recipe(path).stages == load_recipe(parse_recipe(FIXED)).stages

    for data, where in {
        text.encode("utf-16"): "1:1: error: not UTF-8 (byte 0xff): save the file as UTF-8",
        b"version: 1\nname: caf\xe9\n": "2:10: error: not UTF-8 (byte 0xe9): save the file as UTF-8",
        b"\xef\xbb\xbfname: \xe9": "1:7: error: not UTF-8 (byte 0xe9): save the file as UTF-8",
        text.encode("utf-16-le"): "1:2: error: character '\\x00' is not allowed",
    }.items():
        path.write_bytes(data)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(f"{path}:{where}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sparse.yaml").write_text(FIXED)
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    near = tmp_path / "sparse.yaml"
    for path, message in {
        tmp_path / "sparce.yaml": f"no such file (did you mean {str(near)!r}?)",
        tmp_path: "this is a folder, expected a recipe file",
        tmp_path / "big.yaml": "a recipe has at most 1048576 bytes",
        Path("/dev/zero"): "this is not a regular file",
        Path("a\0b.yaml"): "cannot be read: embedded null byte",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).endswith(f": error: {message}")
        assert len(caught.value.problems) == 1


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(
        RecipeError, match=r"no recipe 'sparsevlmm' comes with tokenprune \(did you mean 'sparsevlm'\?\)"
    ):
        load_recipe("sparsevlmm")


def test_source_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="got int"):
        load_recipe(5)  # type: ignore[arg-type]
