"""Nothing is lost: kills at random moments, full disks, read-only folders, and files that are never half-written."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenprune.core.files import append_line, cut_broken_line, whole_file, whole_lines

ROOT = Path(__file__).parents[1]
SMALL = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
"""A disk that is full after so many bytes of any file."""
CLI = "from tokenprune.cli.main import call; sys.exit(call(sys.argv[1:]))"
TRAINING = "import killing, pathlib; killing.train(pathlib.Path(sys.argv[1]))"


def started(code: str, *arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        command, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, **more
    )


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("eval", 2),
        *(pytest.param(kind, kills, marks=pytest.mark.slow) for kind, kills in (("many", 2), ("training", 3))),
    ],
)
def test_killed_runs_end_as_uninterrupted_ones(kind: str, kills: int) -> None:
    done = started("import sys, killing; print(killing.survive(sys.argv[1], int(sys.argv[2])))", kind, kills)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eval", "tune", "training", "bench", "many"])
def test_many_kills(kind: str) -> None:
    done = started("import sys, killing; print(killing.survive(sys.argv[1], 20))", kind)
    assert done.returncode == 0, done.stderr


@pytest.mark.in_turn(2)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["new", "ls --json"])
def test_a_full_disk_behind_stdout_is_told_in_one_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        done = started(f"import sys; {CLI}", *command.split(), stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: cannot write the output: No space left on device\n")


@pytest.mark.in_turn(4)
@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [
        (CLI, "eval fastv --scenes 2 --seeds 1 --output {}/o", "error: --output: cannot write {}/o/results.jsonl: "),
        (CLI, "schema --output {}/s.json", "error: --output: cannot write {}/s.json: "),
        (CLI, "run --save-plot {}/p.png", "error: cannot write {}/p.png: "),
        (TRAINING, "{}", "error: cannot use {}: "),
    ],
    ids=["journal", "schema", "plot", "training"],
)
def test_a_full_disk_is_told_in_one_line(code: str, arguments: str, told: str, tmp_path: Path) -> None:
    words = [word.format(tmp_path) for word in arguments.split()]
    done = started(SMALL.format(limit=900) + code, *words, stdout=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode != 0
    assert len(lines) == 1 and lines[0].startswith(told.format(tmp_path)), done.stderr
    assert not {path.name for path in tmp_path.iterdir()} - {"o", "training.json", "training_log.jsonl"}


@pytest.mark.in_turn(3)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write to")
@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (CLI, "eval fastv --scenes 1 --seeds 1 --output /proc/o"),
        (CLI, "schema --output /proc/s.json"),
        (TRAINING, "/proc/o"),
    ],
    ids=["journal", "schema", "training"],
)
def test_a_folder_that_nobody_may_write_to_is_told_in_one_line(code: str, arguments: str) -> None:
    done = started(f"import sys; {code}", *arguments.split(), stdout=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode != 0
    assert len(lines) == 1 and lines[0].startswith("error: ") and "/proc" in lines[0], done.stderr


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_line_that_breaks_off_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert whole_lines(path) == []
    cut_broken_line(path)
    for line in ("one", "zwei ü"):
        append_line(path, line)
    with path.open("ab") as file:
        file.write(b"thr")
    assert whole_lines(path) == [b"one", "zwei ü".encode()]
    cut_broken_line(path)
    cut_broken_line(path)
    append_line(path, "four")
    assert path.read_text(encoding="utf-8") == "one\nzwei ü\nfour\n"


def test_every_file_is_written_by_one_helper() -> None:
    """The journal opens its file, too, to learn before a long run whether it may write there."""
    found = []
    for path in (ROOT / "tokenprune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            modes = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            method = isinstance(node.func, ast.Attribute) and name in ("write_text", "write_bytes")
            if method or (name == "open" and modes & {"w", "wb", "a", "ab", "x", "xb", "r+"}):
                found.append(path.relative_to(ROOT / "tokenprune").as_posix())
    assert sorted(found) == ["core/files.py", "study/evaluate/journal.py"]
