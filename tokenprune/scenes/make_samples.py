"""A script that draws the sample pictures of the package.

    python -m tokenprune.scenes.make_samples

Scenes are taken blindly, in order, from a held-out stream: the first that fits each slot below. Only the first slot,
the picture of the demonstrations, also asks that the model answers it right, untouched and with the recipe `sparsevlm`.
It shows what a recipe does; how often that goes well is a matter for a benchmark, not for a demonstration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tokenprune.core.files import whole_file
from tokenprune.engine.attach import attach
from tokenprune.scenes.answering import answer
from tokenprune.scenes.embedded import load_embedded
from tokenprune.scenes.samples import FOLDER
from tokenprune.scenes.world.generate import TEST_SEEDS, UNITS, Scene, scene
from tokenprune.scenes.world.questions import Question, questions

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

SEED = TEST_SEEDS[1]
SIDE = 384
SLOTS = (
    ("localisation", True),
    ("colour", True),
    ("shape", False),
    ("size", True),
    ("existence", False),
    ("counting", True),
    ("ground", True),
    ("code", True),
    ("relation", False),
    ("box", True),
)
"""(task, on a photographic ground)."""


def _first(task: str, photographic: bool, start: int) -> tuple[Scene, Question]:
    """The first scene from `start` on with a question of `task` that ends in punctuation, and that question."""
    index = start
    while True:
        item = scene(SEED, index)
        found = questions(item, [task]) if item.photographic == photographic else []
        if found and found[0].question[-1] in "?.":
            return item, found[0]
        index += 1


def _demonstrates(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, item: Scene, question: Question
) -> bool:
    asked = [(item.render(SIDE), question.question)]
    untouched = answer(model, processor, asked)
    with attach(model, "sparsevlm"):
        reduced = answer(model, processor, asked)
    return untouched == reduced == [question.answer]


def _draw(item: Scene, question: Question, number: int, folder: Path) -> dict[str, Any]:
    name = f"{number}-{question.task}.png"
    with whole_file(folder / name) as file:
        Image.fromarray(item.render(SIDE)).save(file, format="PNG", optimize=True)
    box = [round(value / UNITS, 4) for value in question.box] if question.box else None
    return {
        "file": name,
        "question": question.question,
        "answer": question.answer,
        "task": question.task,
        "ground": item.ground,
        "difficulty": question.difficulty,
        "box": box,
        "seed": [item.seed, item.index],
    }


def make(folder: Path) -> list[dict[str, Any]]:
    """Draw all samples into `folder` and describe them in `samples.json`."""
    model, processor = load_embedded()
    folder.mkdir(parents=True, exist_ok=True)
    entries, start = [], 0
    for number, (task, photographic) in enumerate(SLOTS, start=1):
        item, question = _first(task, photographic, start)
        while number == 1 and not _demonstrates(model, processor, item, question):
            item, question = _first(task, photographic, item.index + 1)
        start = item.index + 1
        entries.append(_draw(item, question, number, folder))
    with whole_file(folder / "samples.json") as file:
        file.write(f"{json.dumps(entries, indent=1)}\n".encode())
    return entries


if __name__ == "__main__":
    for entry in make(FOLDER):
        print(entry["file"], entry["question"], "->", entry["answer"])
