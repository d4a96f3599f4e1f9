"""The commands of docs/serving.md that need nothing but this package, word for word but for files and the model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tokenprune as tp

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def commands() -> list[list[str]]:
    """The lines of its blocks of shell, those that go on joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.replace("my-llava", "embedded")) for line in lines]


def test_the_page_has_a_command_of_each_kind() -> None:
    assert [words[:2] for words in commands()] == [["tokenprune", name] for name in ("run", "eval", "tune")]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_its_commands_run(
    number: int, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    lines = []
    for case in tp.scene_cases(4, tasks=["colour"])[:4]:
        case.picture().save(f"photos/{len(lines)}.png")
        lines.append(json.dumps({"image": f"{len(lines)}.png", "question": case.question, "answer": case.answer}))
    Path("questions.jsonl").write_text("\n".join(lines))
    words = commands()[number][1:]
    assert "--workers" in words
    ran = cli(*words)
    assert ran.status == 0, ran.err
    assert Path(words[words.index("--output") + 1]).exists()
