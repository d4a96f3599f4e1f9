"""lmms-eval end to end on a task of scenes, without a network: its score against our own count of right answers.

python try_lmms_eval.py          # needs lmms-eval 0.7.3 and this package; exit code 1 if they differ
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets

import tokenprune as tp
from tokenprune.families.chat import Chat

RECIPE, KEEP, TOKENS, SCENES = "random", 0.25, 16, 3

TASK = """
task: tokenprune_scenes
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_messages: !function utils.messages
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {tokens}, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""

UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]


def messages(doc, kwargs=None):
    content = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
"""


PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
LAUNCH = {"one process": ["python"], "two processes": ["torchrun", "--nproc-per-node", "2"]}
"""How the page begins its commands."""


def page_command(begins: list[str]) -> list[str]:
    """The command of the page that begins so, this environment's."""
    lines = [line.split() for line in PAGE.read_text(encoding="utf-8").splitlines()]
    (told,) = [line for line in lines if line[: len(begins)] == begins and "TASK" in line]
    names = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*names[told[0]], *told[1:]]


def scored(folder: Path, launch: str, *, arguments: str, batch: int) -> tuple[int, float]:
    """Exit code and exact match of a run of lmms-eval, by the page's command with these values in it."""
    out = folder / f"out-{batch}-{launch[:3]}"
    command = page_command(LAUNCH[launch])
    values = {"--model_args": arguments, "--tasks": "tokenprune_scenes", "--batch_size": str(batch)}
    for option, value in values.items():
        command[command.index(option) + 1] = value
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(out)]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    results = sorted(out.rglob("*results.json"))
    if not results:
        print(done.stdout[-1500:], done.stderr[-1500:], sep="\n")
        return done.returncode, -1.0
    score = json.loads(results[-1].read_text())["results"]["tokenprune_scenes"]
    return done.returncode, next(float(value) for name, value in score.items() if name.startswith("exact_match,"))


def main() -> int:
    cases = tp.scene_cases(SCENES)
    chat = Chat("embedded", *tp.load("embedded"))
    with tp.attach(chat.model, RECIPE, keep=KEEP):
        right = [
            chat.text(chat.generate(chat.inputs([case.picture()], case.question), TOKENS)[0]) == case.answer
            for case in cases
        ]
    expected = sum(right) / len(right)
    with TemporaryDirectory() as made:
        folder = Path(made)
        rows = [{"image": case.picture(), "question": case.question, "answer": case.answer} for case in cases]
        datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "data")
        (folder / "tasks").mkdir()
        (folder / "tasks" / "scenes.yaml").write_text(TASK.format(data=folder / "data", tokens=TOKENS))
        (folder / "tasks" / "utils.py").write_text(UTILS)
        good = True
        arguments = f"pretrained=embedded,recipe={RECIPE},keep={KEEP}"
        for launch, batch in (("one process", 1), ("one process", 4), ("two processes", 4)):
            code, found = scored(folder, launch, arguments=arguments, batch=batch)
            told = f"exact match {found:.4f}, our own {expected:.4f} of {len(cases)}, exit code {code}"
            print(f"{launch}, batch {batch}: {told}", flush=True)
            good = good and code == 0 and abs(found - expected) < 1e-9
        for launch in LAUNCH:
            code, found = scored(folder, launch, arguments="pretrained=embedded,recipe=fastv,keep=7.5", batch=2)
            print(f"{launch}, a budget out of range: exit code {code}, {'no score' if found < 0 else found}")
            good = good and code != 0 and found < 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
