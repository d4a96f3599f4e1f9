"""Accuracy of the embedded model without pruning, on held-out scenes, by batched `model.generate`.

    python benchmarks/scenes/accuracy.py --scenes 150

Writes `accuracy.json` beside this file: per task n, accuracy, 95 % Wilson interval, and two baselines that do not look
at the picture (a uniform guess among the possible answers, and always the answer that is right most often here).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

from tokenprune.scenes import TASKS, TEST_SEEDS, embedded_path, load_embedded
from tokenprune.scenes.answering import answer
from tokenprune.scenes.digest import digest
from tokenprune.scenes.world.generate import CELLS, COLOURS, SHAPES, SIZES, scene
from tokenprune.scenes.world.grounds import GROUNDS
from tokenprune.scenes.world.plates import CODE_LENGTH, LETTERS
from tokenprune.scenes.world.questions import MAX_COUNT, Question, is_right, questions
from tokenprune.study.evaluate import wilson

MIX = (*TASKS, "localisation")
ABOUT_ONE_OBJECT = ("localisation", "relation", "box", "colour", "shape", "size")
ANSWERS = {
    "localisation": CELLS * CELLS,
    "relation": CELLS * CELLS,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "existence": 2,
    "counting": MAX_COUNT + 1,
    "code": len(LETTERS) ** CODE_LENGTH,
    "ground": len(GROUNDS),
}
"""Possible answers; a box is right within a tolerance, so guessing has no simple chance."""


def summary(results: list[tuple[Question, bool]]) -> dict[str, Any]:
    """n, accuracy, interval and baselines of some answered questions of one task."""
    n, right = len(results), sum(ok for _, ok in results)
    task, answers = results[0][0].task, [question.answer for question, _ in results]
    common = max(sum(is_right(task, guess, answer) for answer in answers) for guess in set(answers))
    return {
        "n": n,
        "accuracy": round(right / n, 4),
        "interval": [round(end, 4) for end in wilson(right, n)],
        "chance": round(1 / ANSWERS[task], 4) if task in ANSWERS else None,
        "most_frequent_answer": round(common / n, 4),
    }


def measure(folder: Path, scenes: int, stream: int, batch_size: int) -> dict[str, Any]:
    """Answer `len(MIX)` questions about each of `scenes` held-out scenes."""
    model, processor = load_embedded(folder)
    by_task: dict[str, list[tuple[Question, bool]]] = defaultdict(list)
    by_difficulty: dict[str, list[tuple[Question, bool]]] = defaultdict(list)
    start = time.perf_counter()
    for index in track(range(scenes), description="scenes"):
        item = scene(TEST_SEEDS[stream], index)
        asked = questions(item, MIX)
        answers = answer(model, processor, ((item.image, q.question) for q in asked), batch_size=batch_size)
        for question, given in zip(asked, answers, strict=True):
            result = (question, question.is_right(given))
            by_task[question.task].append(result)
            if question.task in ABOUT_ONE_OBJECT:
                by_difficulty[f"{question.task}: {question.difficulty}"].append(result)
    seconds = time.perf_counter() - start
    everything = [ok for results in by_task.values() for _, ok in results]
    return {
        "scenes": scenes,
        "seed": TEST_SEEDS[stream],
        "questions": len(everything),
        "accuracy": round(sum(everything) / len(everything), 4),
        "seconds": round(seconds, 1),
        "tasks": {task: summary(by_task[task]) for task in TASKS},
        "difficulty": {name: summary(by_difficulty[name]) for name in sorted(by_difficulty)},
        "weights": digest(folder / "model.safetensors"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the embedded model without pruning.")
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--stream", type=int, default=0, help="which held-out stream of scenes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=embedded_path(), help="folder of weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("accuracy.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.model, options.scenes, options.stream, options.batch_size)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for task, row in result["tasks"].items():
        print(f"{task:<13} {row['accuracy']:.3f}  {row['interval']}  n={row['n']}  chance {row['chance']}")


if __name__ == "__main__":
    main()
