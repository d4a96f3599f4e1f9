"""The tutorial "a paper's table" of docs/serving.md, run to its end on tasks of scenes, without a network.

python try_table.py [FOLDER]     # needs lmms-eval 0.7.3 and this package; exit code 1 if anything fails

Each task is a kind of question about the same scenes. lmms-eval runs once for each method; `tokenprune table` makes the
table, and its scores are held against those that lmms-eval printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from try_lmms_eval import TASK, UTILS

import tokenprune as tp

SCENES, AVERAGE, TOKENS, BATCH = 12, 0.5, 8, 12
TASKS = ("colour", "counting", "relation")
METHODS = ("none", "random", "feather")


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


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "80"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return done.stdout


def made_in(folder: Path) -> int:
    tasks = make_tasks(folder)
    for method in METHODS:
        budget = "" if method == "none" else f",average={AVERAGE}"
        run(
            *(sys.executable, "-m", "lmms_eval", "eval", "--model", "tokenprune"),
            *("--model_args", f"pretrained=embedded,recipe={method}{budget}", "--tasks", ",".join(tasks)),
            *("--include_path", str(folder / "tasks"), "--batch_size", str(BATCH), "--log_samples"),
            *("--output_path", str(folder / "out" / method)),
        )
    command = (sys.executable, "-m", "tokenprune.cli", "table", str(folder / "out"))
    print(run(*command))
    told = json.loads(run(*command, "--json"))
    rows = {row["method"]: row["tasks"] for row in told["rows"]}
    good = len(rows) == len(METHODS)
    for method in METHODS:
        (path,) = (folder / "out" / method).rglob("*_results.json")
        printed = json.loads(path.read_text())["results"]
        for task in tasks:
            score = next(value for key, value in printed[task].items() if key.startswith("exact_match,"))
            found = rows["untouched" if method == "none" else method][task]["score"]
            good = good and abs(found - score) < 1e-9
    print("scores are those that lmms-eval printed" if good else "scores differ from those of lmms-eval")
    return 0 if good else 1


def main() -> int:
    if len(sys.argv) > 1:
        return made_in(Path(sys.argv[1]))
    with TemporaryDirectory() as made:
        return made_in(Path(made))


if __name__ == "__main__":
    sys.exit(main())
