"""The tutorial "a paper's table" of docs/serving.md, run to its end on tasks of scenes, without a network.

python try_table.py [FOLDER]     # needs lmms-eval 0.7.3 and this package; exit code 1 if anything fails

The commands are the page's, word for word but for the model, the tasks, and where those are. Each task is a kind of
question about the same scenes; the scores of the table are held against those that lmms-eval printed.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from try_lmms_eval import TASK, UTILS

import tokenprune as tp

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
SCENES, TOKENS = 6, 8
TASKS = ("colour", "counting", "relation")


def make_tasks(folder: Path) -> list[str]:
    """A task of lmms-eval for each kind of question; their names."""
    cases = tp.scene_cases(SCENES, tasks=TASKS)
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "utils.py").write_text(UTILS)
    for task in TASKS:
        rows = [
            {"image": case.picture(), "question": case.question, "answer": case.answer}
            for case in cases
            if case.task == task
        ]
        data = folder / "data" / task
        datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(data)
        text = TASK.format(data=data, tokens=TOKENS).replace("tokenprune_scenes", f"scenes_{task}")
        (folder / "tasks" / f"{task}.yaml").write_text(text)
    return [f"scenes_{task}" for task in TASKS]


def page_commands(tasks: list[str], folder: Path) -> str:
    """What the page says, with the embedded model, these tasks, and this Python."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (told,) = [block for block in blocks if "tokenprune table" in block]
    for old, new in {
        "pretrained=FOLDER": "pretrained=embedded",
        "--tasks pope,gqa": f"--tasks {','.join(tasks)} --include_path {folder / 'tasks'}",
        "python -m": f"{sys.executable} -m",
        "tokenprune table": f"{sys.executable} -m tokenprune.cli table",
    }.items():
        assert old in told, f"the page does not say {old!r} any more"
        told = told.replace(old, new)
    return told


def made_in(folder: Path) -> int:
    tasks = make_tasks(folder)
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "80"}
    command = ["bash", "-e", "-c", page_commands(tasks, folder)]
    done = subprocess.run(command, env=quiet, cwd=folder, capture_output=True, text=True)
    print(done.stdout[-3000:])
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rows = list(csv.DictReader((folder / "table.csv").open()))
    scores = {(row["method"], row["task"]): float(row["score"]) for row in rows if row["score"]}
    runs = [path for path in (folder / "runs").iterdir() if path.is_dir()]
    good = len(scores) == len(runs) * len(tasks) and (folder / "table.md").read_text().count("|---|") > 0
    for run in runs:
        (path,) = run.rglob("*_results.json")
        printed = json.loads(path.read_text())["results"]
        for task in tasks:
            score = next(value for key, value in printed[task].items() if key.startswith("exact_match,"))
            good = good and abs(scores[run.name, task] - score) < 1e-9
    print("scores are those that lmms-eval printed" if good else "scores differ from those of lmms-eval")
    return 0 if good else 1


def main() -> int:
    if len(sys.argv) > 1:
        return made_in(Path(sys.argv[1]))
    with TemporaryDirectory() as made:
        return made_in(Path(made))


if __name__ == "__main__":
    sys.exit(main())
