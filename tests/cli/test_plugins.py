"""Parts of others on the command line: installed ones, one that fails, and a file that is only tried."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenprune import registry
from tokenprune.errors import RecipeError

CLI = Callable[..., Any]
OURS = "version: 1\nbudget: {keep: 0.5}\nstages:\n  - {place: after_vision, scorer: norm}\n"
MINE = OURS.replace("norm", "{type: left, power: 3.0}")
PART = '''"""A scorer that likes the left of a picture."""

from typing import Annotated

from pydantic import Field

import tokenprune as tp


class LeftScorer(tp.Scorer):
    """Scores by column.

    Args:
        power: how much.
    """

    multiply_adds = tp.no_products
    reads = tp.Needs(grid=True)

    def __init__(self, *, power: Annotated[float, Field(gt=0)] = 1.0) -> None:
        super().__init__()
        self.power = power
        self.check()

    def forward(self, tokens, raters=None):
        return -self.power * tokens.cell[..., 2].float()
'''


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a recipe of ours, one that names `left`, and the file that brings it."""
    (tmp_path / "ours.yaml").write_text(OURS)
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "left.py").write_text(PART)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a package `theirs` of this source, as pip leaves it behind."""

    def forget() -> None:
        for kept in (registry._declared, registry._loaded, registry._warn_once):
            kept.cache_clear()
        sys.modules.pop("theirs", None)

    def made(source: str) -> None:
        site = tmp_path / "site"
        info = site / "theirs-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "theirs.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        points = "scorer.left = theirs:LeftScorer\nsampler.left = theirs:LeftSampler\n"
        (info / "entry_points.txt").write_text(f"[tokenprune.parts]\n{points}")
        monkeypatch.syspath_prepend(str(site))
        forget()

    yield made
    monkeypatch.undo()
    forget()


def test_recipes_that_do_not_name_a_plug_in_never_import_it(
    work: Path, install: Callable[[str], None], cli: CLI
) -> None:
    install(f"open({str(work / 'imported')!r}, 'w')\n{PART}")
    for command in (("check", "ours.yaml"), ("show", "sparsevlm"), ("flops", "ours.yaml"), ("ls",)):
        done = cli(*command)
        assert (done.status, done.err) == (0, "")
    wrong = cli("check", "ours.yaml", "mine.yaml", "--format", "json")
    assert wrong.status == 0 and (work / "imported").exists()  # now it was named, and it works
    assert json.loads(wrong.out)["ok"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('no licence\\nfile')", "OSError: no licence"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise SystemExit", "SystemExit: no message"),
    ],
)
def test_a_plug_in_that_fails_harms_only_recipes_that_name_it(
    source: str, reason: str, work: Path, install: Callable[[str], None], cli: CLI
) -> None:
    install(source)
    told = f"plug-in 'theirs' (sampler.left, scorer.left) cannot be loaded: {reason}"
    for command in (("check", "ours.yaml"), ("show", "ours.yaml"), ("run", "--recipe", "ours.yaml", "--json")):
        done = cli(*command)
        assert (done.status, done.err) == (0, "")
    named = cli("show", "mine.yaml")
    assert (named.status, named.out) == (2, "")
    assert named.err.splitlines()[0] == f"mine.yaml:4:42: error: stages.0.scorer: {told}"
    listed = cli("ls", "parts", "--json")
    assert (listed.status, listed.err) == (0, f"note: {told}\n")
    rows = {row["name"] for row in json.loads(listed.out)["parts"]}
    assert "norm" in rows and "left" not in rows


COMMANDS = (
    "run --recipe mine.yaml --json",
    "eval mine.yaml --keep 0.5 --scenes 2 --no-baselines --json",
    "bench mine.yaml --rounds 1 --batch 1 --new-tokens 1 --no-baselines --json",
    "audit mine.yaml --scenes 2 --json",
    "flops mine.yaml --json",
    "show mine.yaml --json",
    "check mine.yaml --json",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_part_is_tried_from_a_file_on_every_command(command: str, work: Path, cli: CLI) -> None:
    before = set(sys.modules)
    done = cli(*command.split(), "--plugin", "left.py")
    assert done.status == 0, done.err
    assert json.loads(done.out)
    assert not [name for name in set(sys.modules) - before if name.startswith("tokenprune_plugin")]
    without = cli(*command.split())
    assert without.status == 2
    assert "no such part 'left'" in without.out + without.err


def test_a_file_of_parts_is_listed_and_does_what_it_says(work: Path, cli: CLI) -> None:
    """The left half of the columns is kept, in every row."""
    rows = json.loads(cli("ls", "parts", "left", "--plugin", "left.py", "--json").out)["parts"]
    assert [(row["role"], row["name"], row["summary"]) for row in rows] == [("scorer", "left", "Scores by column.")]
    facts = json.loads(cli("run", "--recipe", "mine.yaml", "--plugin", "left.py", "--json").out)
    assert {index % 12 for index in facts["stages"][0]["kept"]} == set(range(6))
    assert "left" not in registry.names("scorer")
    with pytest.raises(RecipeError, match="unknown scorer 'left'"):
        registry.get("scorer", "left")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "--plugin: no such file: bad.py"),
        ("x = 1\nimport nowhere_at_all\n", "--plugin: bad.py:2: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(:\n", "--plugin: bad.py:1: SyntaxError: invalid syntax"),
        ("def f():\n    raise SystemExit('x')\n\n\nf()\n", "--plugin: bad.py:2: SystemExit: x"),
        (
            "from tokenprune import Scorer\n",
            "--plugin: bad.py has no part: a class that derives",
        ),
        (PART.replace("LeftScorer", "NormScorer"), "--plugin: bad.py: NormScorer: there is a scorer 'norm' already"),
        (
            PART.replace("*, power", "power"),
            "argument 'power' must be keyword-only",
        ),
    ],
)
def test_a_file_that_brings_no_part_is_told_in_one_line(source: str | None, message: str, work: Path, cli: CLI) -> None:
    if source is not None:
        (work / "bad.py").write_text(source)
    done = cli("show", "fastv", "--plugin", "bad.py")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


def test_two_files_bring_a_name_once(work: Path, cli: CLI) -> None:
    (work / "again.py").write_text(PART)
    done = cli("show", "fastv", "--plugin", "left.py", "--plugin", "again.py")
    assert done.status == 2
    assert done.err == "error: --plugin: again.py: LeftScorer: there is a scorer 'left' already; choose another name\n"


def test_a_recipe_cannot_name_a_file_of_parts(work: Path, cli: CLI) -> None:
    (work / "left.py").write_text("open('imported', 'w')\n")
    for name in ("left.py", "./left.py", "left:LeftScorer", "left.LeftScorer"):
        (work / "mine.yaml").write_text(OURS.replace("norm", json.dumps(name)))
        done = cli("check", "mine.yaml")
        assert done.status == 2 and "no such part" in done.err
    (work / "mine.yaml").write_text(OURS + "plugin: left.py\n")
    assert "unknown key" in cli("check", "mine.yaml").err
    assert not (work / "imported").exists()
