"""What `tokenprune eval --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.study.paper.runs import Run, TaskScore

NAME = "`tokenprune eval --json`"
KEYS = {"rows", "tasks", "measure", "model"}
UNTOUCHED = "untouched"


def runs(file: Path, told: Mapping[str, Any]) -> list[Run]:
    """A run for each condition at each budget."""
    return [
        Run(
            source=file,
            model=told["model"],
            method=row["condition"],
            budget=row["budget"],
            untouched=row["condition"] == UNTOUCHED,
            tasks={task: [_score(file, told, number, task)] for task in told["tasks"]},
            when=file.name,
            average=row["average"] / row["total"],
            flops_share=row["flops_share"],
        )
        for number, row in enumerate(told["rows"])
    ]


def _score(file: Path, told: Mapping[str, Any], number: int, task: str) -> TaskScore:
    value, questions = told["rows"][number]["tasks"][task]["accuracy"]["value"], told["tasks"][task]["questions"]
    samples = told.get("samples")  # not in files of versions before it
    if samples is None:
        return TaskScore(told["measure"], value, questions)
    of = [index for index, name in enumerate(samples["task"]) if name == task]
    names = {index: f"{index} {samples['question'][index]}" for index in of}
    each = {names[index]: samples["scores"][number][index] for index in of}
    pictures = {names[index]: samples["picture"][index] for index in of}
    return TaskScore(told["measure"], value, questions, True, each, pictures, drawn_with=str(file))
