"""The command line as a process: what it imports, and how it stops."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokenprune.cli.main import call

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "tokenprune.cli"]


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["run", "--help"], ["rnu"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from tokenprune.cli.main import call; call(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("command", ["run", "ls", "show", "flops", "check", "new", "schema"])
def test_help_teaches_by_examples(command: str) -> None:
    done = subprocess.run([*RUN, command, "--help"], check=True, cwd=ROOT, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines()]
    examples = lines[lines.index("Examples:") + 1 :]
    assert sum(line.startswith("tokenprune ") for line in examples) + sum("$schema=" in line for line in examples) >= 2


def test_closed_pipe_is_quiet() -> None:
    """`tokenprune new | head -0`: the reader leaves before anything was written."""
    process = subprocess.Popen([*RUN, "new"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to other processes")
def test_interrupt_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run: status 130, no traceback, nothing written."""
    code = (
        "import signal, sys, time; from tokenprune.cli.main import call; import tokenprune.cli.run as run;"
        # A test run started in the background ignores the signal, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "run.open_picture = lambda *given: (print('ready', flush=True), time.sleep(60));"
        f"sys.exit(call(['run', '--image', 'x.png', '--question', 'x', '--save-plot', {str(tmp_path / 'x.png')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert call(["new"]) == 0
    assert call(["show", "fastv"]) == 0


def test_no_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(path: Path, option: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. " * 50)

    monkeypatch.setattr("tokenprune.cli.run.open_picture", full)
    assert call(["run", "--image", "x.png", "--question", "x"]) == 1
    assert capsys.readouterr() == (
        "",
        "error: the device ran out of memory; try --dtype bfloat16, smaller or fewer pictures, or --device cpu\n",
    )
